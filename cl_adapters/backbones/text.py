"""How a backbone wants its texts: the tokenizer, recorded with everything trained on it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from cl_adapters.backbones.tokens import from_rows
from cl_adapters.errors import ConfigError, DataError


@dataclass(frozen=True, kw_only=True)
class TextPreprocessing:
    """Text preprocessing: what decides which tokens a text becomes. Make it with :meth:`of`.

    Nothing is padded here but to give a batch one shape; empty places hold -1 (:mod:`cl_adapters.backbones.tokens`).

    Attributes:
        max_length: tokens that are kept of a text, special ones included.
        tokenizer: SHA-256 of the tokenizer as it is written to a file.
    """

    modality: ClassVar[str] = "text"
    max_length: int
    tokenizer: str

    def __post_init__(self) -> None:
        if self.max_length < 1:
            raise ValueError(f"max_length must be at least 1, got {self.max_length}")

    @classmethod
    def of(cls, tokenizer: Any, max_length: int) -> TextPreprocessing:
        """The preprocessing of a tokenizer of transformers, which is held apart from what is compared and written.

        Raises:
            ValueError: so few tokens that nothing is left of any text.
        """
        return cls(max_length=max_length, tokenizer=tokenizer_hash(tokenizer))._with(tokenizer)

    @property
    def tool(self) -> Any:
        """The tokenizer itself.

        Raises:
            ConfigError: this was read from a file; only the loaded backbone has it.
        """
        tokenizer = self.__dict__.get("_tokenizer")
        if tokenizer is None:
            raise ConfigError(
                "this text preprocessing only says which tokenizer was used; take the preprocessing of the loaded "
                'backbone: FrozenBackbone.load("hf:...").preprocessing'
            )
        return tokenizer

    def encode(self, texts: Sequence[str], length: int | None = None) -> Tensor:
        """Token ids, with the special tokens that the model wants, in ``length`` columns; default: of the longest.

        Returns:
            int64 [B, N], -1 where there is no token.

        Raises:
            DataError: see :func:`check_texts`; or a text that gives no token at all.
        """
        check_texts(texts)
        if not texts:
            return from_rows([], length or 0)
        limit = self.max_length if length is None else min(length, self.max_length)
        made = self.tool(list(texts), truncation=True, max_length=limit, padding=False, return_attention_mask=False)
        return from_rows([ids or self._nothing(texts[place]) for place, ids in enumerate(made["input_ids"])], length)

    def eval_transform(self, length: int | None = None) -> Callable[[str], Tensor]:
        """From one text to int64 [N]: always the same shape, so that loaders can stack them.

        Args:
            length: N; default ``max_length``. The length of the longest text gives the same features and needs less
                memory.
        """
        return _ToTokens(self, self.max_length if length is None else length)

    def _with(self, tokenizer: Any) -> TextPreprocessing:
        special = len(tokenizer("")["input_ids"])
        if self.max_length <= special:
            raise ValueError(
                f"max_length={self.max_length} leaves no room for a text: the tokenizer adds {special} special tokens "
                f"to each, so choose at least {special + 1}"
            )
        object.__setattr__(self, "_tokenizer", tokenizer)
        return self

    def _nothing(self, text: str) -> list[int]:
        """What stands for a text that becomes no token, as the empty one does with the tokenizers of GPT-2."""
        for kind in ("bos", "cls", "eos", "sep", "unk"):
            token = getattr(self.tool, f"{kind}_token_id", None)
            if token is not None:
                return [int(token)]
        raise DataError(f"the tokenizer makes no token of the text {text!r}, and it has no special ones")


class _ToTokens:
    """One text to one row; a class, so that loader workers can receive it."""

    def __init__(self, preprocessing: TextPreprocessing, length: int) -> None:
        self.preprocessing = preprocessing
        self.length = length

    def __call__(self, text: str) -> Tensor:
        return self.preprocessing.encode([text], self.length)[0]


def check_texts(texts: Sequence[str]) -> None:
    """Check that these are texts.

    Raises:
        DataError: one text instead of a list; something else than str; halves of a character, as badly decoded files
            and terminals give them.
    """
    if isinstance(texts, str):
        raise DataError("a list of texts is expected, got one text: put it into a list")
    for place, text in enumerate(texts):
        if not isinstance(text, str):
            raise DataError(f"text {place} is no str but {type(text).__name__}")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise DataError(
                f"text {place} has no characters of UTF-8 at {error.start} ({text[error.start : error.end]!a}): it was "
                "cut within a character, or read with another encoding than its own"
            ) from error


def tokenizer_hash(tokenizer: Any) -> str:
    """SHA-256 of a tokenizer of transformers: vocabulary, merges, normalisation, special tokens.

    The limits of length and padding, which calls change, are left out.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:  # one written in Python
        content: dict[str, Any] = {"class": type(tokenizer).__name__, "vocabulary": tokenizer.get_vocab()}
        content["special"] = {key: str(value) for key, value in tokenizer.special_tokens_map.items()}
    else:
        content = json.loads(backend.to_str()) | {"truncation": None, "padding": None}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
