"""Prompts and answers as tokens: cut to fit, joined, padded on either side. B batch, N tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cl_adapters.backbones.text import TextPreprocessing, check_texts
from cl_adapters.backbones.tokens import NO_TOKEN, from_rows
from cl_adapters.errors import DataError

Ids = list[int]
Pair = tuple[Ids, Ids]
"""Prompt and answer."""


@dataclass(frozen=True)
class Joined:
    """Prompts followed by answers.

    Attributes:
        tokens_BN: int64 [B, N], -1 where there is no token.
        answer_BN: bool [B, N], which places hold tokens of the answers.
    """

    tokens_BN: Tensor
    answer_BN: Tensor

    @property
    def first(self) -> int:
        """The first column in which a row has a token of its answer."""
        return int(self.answer_BN.any(0).long().argmax())

    def to(self, device: torch.device) -> Joined:
        """The same on another device."""
        return Joined(self.tokens_BN.to(device), self.answer_BN.to(device))


class PromptTokens:
    """Turns prompts and answers into tokens.

    A prompt begins as the tokenizer begins a text (Llama: with its token for the beginning) and never ends with a token
    for the end. An answer is tokenised on its own: where the tokenizer tells " yes" from "yes", write the space at its
    beginning. What is too long is cut at the front of the prompt, since the question stands at its end.

    Args:
        preprocessing: of the backbone, with its tokenizer.
        end: ids of the tokens that end an answer, beside the tokenizer's own.
        fill: id that the model takes at empty places.
        vocabulary: number of ids that it knows; None: not said.
    """

    def __init__(
        self,
        preprocessing: TextPreprocessing,
        end: Sequence[int] = (),
        fill: int = 0,
        vocabulary: int | None = None,
    ) -> None:
        self.preprocessing = preprocessing
        tool: Any = preprocessing.tool
        own = getattr(tool, "eos_token_id", None)
        self.end = list(dict.fromkeys([*([] if own is None else [int(own)]), *end]))
        empty = list(tool("", add_special_tokens=True)["input_ids"])
        first = {getattr(tool, f"{kind}_token_id", None) for kind in ("bos", "cls")} - {None}
        self.start: Ids = empty[:1] if empty and empty[0] in first else []
        self.fill = fill
        self.vocabulary = vocabulary
        self._check_known("the tokenizer's special tokens", [*self.start, *self.end])

    def prompts(self, texts: Sequence[str], room: int = 0) -> list[Ids]:
        """Ids of prompts, at most ``max_length - room`` each.

        Raises:
            DataError: no room for a prompt, a prompt without any token, something that is no text, or a token that the
                model does not know.
        """
        return self._fitting(texts, self._plain(texts), [room] * len(texts))

    def pairs(self, prompts: Sequence[str], answers: Sequence[str], *, end: bool) -> list[Pair]:
        """Ids of prompts and of their answers, together at most ``max_length``.

        With ``end``, every answer has the tokenizer's end token behind it, where there is one.

        Raises:
            DataError: different numbers of both, an answer without any token or too long, or a prompt as in
                :meth:`prompts`.
        """
        if len(prompts) != len(answers):
            raise DataError(f"{len(prompts)} prompts but {len(answers)} answers")
        behind = self.end[:1] if end else []
        found = [[*ids, *behind] for ids in self._plain(answers)]
        for answer, ids in zip(answers, found, strict=True):
            if len(ids) == len(behind):
                raise DataError(f"the answer {answer!r} becomes no token")
        fronts = self._fitting(prompts, self._plain(prompts), list(map(len, found)))
        return list(zip(fronts, found, strict=True))

    def text(self, ids: Sequence[int]) -> str:
        """The text of generated tokens up to the first that ends an answer, without spaces around it."""
        kept: Ids = []
        for token in ids:
            if token in self.end:
                break
            kept.append(int(token))
        made: str = self.preprocessing.tool.decode(kept, skip_special_tokens=True)
        return made.strip()

    def _plain(self, texts: Sequence[str]) -> list[Ids]:
        check_texts(texts)
        if not texts:
            return []
        different = list(dict.fromkeys(texts))  # a prompt stands here once for each of its possible answers
        made = self.preprocessing.tool(different, add_special_tokens=False, padding=False, truncation=False)
        rows = {text: list(ids) for text, ids in zip(different, made["input_ids"], strict=True)}
        for text, ids in rows.items():
            self._check_known(f"{text[:60]!r}", ids)
        return [rows[text] for text in texts]

    def _check_known(self, what: str, ids: Sequence[int]) -> None:
        highest = max(ids, default=0)
        if self.vocabulary is not None and highest >= self.vocabulary:
            raise DataError(
                f"token id {highest} in {what}, but the model knows the ids 0..{self.vocabulary - 1}: its folder holds "
                "the tokenizer of another model, or one with tokens that were added later"
            )

    def _fitting(self, texts: Sequence[str], rows: list[Ids], rooms: list[int]) -> list[Ids]:
        found = []
        for text, ids, room in zip(texts, rows, rooms, strict=True):
            left = self.preprocessing.max_length - room - len(self.start)
            if left < 1:
                raise DataError(
                    f"{room} tokens of an answer leave no room for a prompt: the model takes "
                    f"{self.preprocessing.max_length} tokens in all (max_length)"
                )
            whole = [*self.start, *ids[-left:]] or self.end[:1]
            if not whole:
                raise DataError(f"the prompt {text!r} becomes no token, and the tokenizer has no special ones")
            found.append(whole)
        return found


def joined(pairs: Sequence[Pair], *, left: bool = False) -> Joined:
    """Prompts and answers in one tensor, padded on the right, or with ``left`` on the left."""
    tokens_BN = padded_ids([prompt + answer for prompt, answer in pairs], left=left)
    flags_BN = padded_ids([[0] * len(prompt) + [1] * len(answer) for prompt, answer in pairs], left=left)
    return Joined(tokens_BN, flags_BN == 1)


def padded_ids(rows: Sequence[Ids], *, left: bool) -> Tensor:
    """Rows of ids as int64 [B, N], -1 behind them, or with ``left`` before them."""
    if not left:
        return from_rows(rows)
    return from_rows([row[::-1] for row in rows]).flip(1)


def positions(tokens_BN: Tensor) -> Tensor:
    """Place of every token in its text, int64 [B, N], wherever the row is padded."""
    return ((tokens_BN != NO_TOKEN).long().cumsum(1) - 1).clamp_min(0)


def choice_lists(choices: Sequence[Sequence[str]] | Sequence[str], prompts: int) -> list[list[str]]:
    """The answers that each of so many prompts may have, from one list for all or a list for each.

    Raises:
        DataError: a prompt without choices, or not one list per prompt.
    """
    same = [choice for choice in choices if isinstance(choice, str)]
    lists = [same] * prompts if len(same) == len(choices) else [list(choice) for choice in choices]
    if len(lists) != prompts:
        raise DataError(f"{prompts} prompts, but {len(lists)} lists of choices: give one list for all, or one for each")
    if not all(lists):
        raise DataError("every prompt needs at least one choice")
    return lists
