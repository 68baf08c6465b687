"""Answering: how likely a frozen causal language model finds an answer, which of some it takes, and what it writes.

B prompts, N tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cl_adapters.bank.routes import Routes
from cl_adapters.errors import ConfigError, DataError
from cl_adapters.language.choices import shared_scores
from cl_adapters.language.load import generation_options
from cl_adapters.language.passes import Passes
from cl_adapters.language.routes import check_rows, has_router, taken
from cl_adapters.language.tokens import Joined, Pair, choice_lists, filled, joined

BATCH = 16
"""Rows computed at a time where nothing flows back."""


class Answering(Passes):
    """What a causal language model with adapters says to prompts; changes no state."""

    # --- likelihood ----------------------------------------------------------------------------------------------

    def loss(
        self,
        prompts: Sequence[str],
        answers: Sequence[str],
        routes: Routes | None = None,
        noise: torch.Generator | None = None,
    ) -> Tensor:
        """Mean of -log p over the tokens of the answers and their end tokens; prompts count nothing.

        Args:
            prompts: B prompts.
            answers: B answers.
            routes: who uses which adapter; None: the bare model.
            noise: generator of the adapters' dropout masks.

        Returns:
            float32 [], differentiable with respect to the adapters.

        Raises:
            DataError: nothing to learn from, or texts that cannot be used (:class:`PromptTokens`).
        """
        if not prompts:
            raise DataError("a batch needs at least one prompt")
        check_rows(routes, len(prompts))
        batch = joined(self.tokens.pairs(prompts, answers, end=True))
        log_p_BN, counted_BN = self.answer_log_p(batch, routes, noise)
        return -log_p_BN.sum() / counted_BN.sum()

    def log_likelihood(
        self,
        prompts: Sequence[str],
        answers: Sequence[str],
        routes: Routes | None = None,
        *,
        normalised: bool = False,
        end: bool = False,
        batch: int = BATCH,
    ) -> Tensor:
        """log p(answer | prompt), the sum over the answer's tokens.

        Args:
            prompts: B prompts.
            answers: B answers.
            routes: who uses which adapter; None: the bare model.
            normalised: divided by the number of tokens.
            end: with the end token, so that an answer that begins another one is no likelier for that alone.
            batch: rows computed at a time, those of similar length together.

        Returns:
            float32 [B] on the CPU; what else is in the batch makes no difference.
        """
        check_rows(routes, len(prompts))
        pairs = self.tokens.pairs(prompts, answers, end=end)
        found_B = self._scores(pairs, routes, batch)
        return found_B / _lengths(pairs) if normalised else found_B

    def _scores(self, pairs: Sequence[Pair], routes: Routes | None, batch: int) -> Tensor:
        """log p of each answer, float32 [B] on the CPU."""
        order_B = torch.tensor([len(prompt) + len(answer) for prompt, answer in pairs]).argsort(descending=True)
        found_B = torch.zeros(len(pairs))
        with torch.no_grad():
            for rows in order_B.split(batch) if pairs else ():
                part = joined([pairs[row] for row in rows.tolist()])
                found_B[rows] = self.answer_log_p(part, taken(routes, rows))[0].sum(1).cpu()
        return found_B

    def answer_log_p(
        self, batch: Joined, routes: Routes | None, noise: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        """log p of each token of the answers given all before it.

        Args:
            batch: prompts and answers, filled on either side.
            routes: who uses which adapter.
            noise: generator of the adapters' dropout masks.

        Returns:
            float32 [B, n], 0 beside the answers, and which places hold tokens of answers, bool [B, n]. n is the number
            of columns from the first of an answer.
        """
        batch = batch.to(self.device)
        first = batch.first
        keep = batch.tokens_BN.shape[1] - first + 1
        logits_BnV = self.output(batch.tokens_BN, routes, noise, keep=keep).logits[:, -keep:-1]
        targets_Bn, counted_Bn = batch.tokens_BN[:, first:], batch.answer_BN[:, first:]
        loss_Bn = F.cross_entropy(
            logits_BnV.float().flatten(0, 1), targets_Bn.clamp_min(0).flatten(), reduction="none"
        ).view_as(targets_Bn)
        return torch.where(counted_Bn, -loss_Bn, 0), counted_Bn

    def choose(
        self,
        prompts: Sequence[str],
        choices: Sequence[Sequence[str]] | Sequence[str],
        routes: Routes | None = None,
        *,
        normalised: bool = False,
        batch: int = BATCH,
    ) -> list[str]:
        """The likeliest of some answers, each with its end token; of equal ones the first.

        A prompt is computed once for all its answers, where its keys and values can be kept as in :meth:`generate`.

        Args:
            prompts: B prompts.
            choices: the answers that are possible, for all prompts or for each.
            routes: who uses which adapter; None: the bare model.
            normalised: compare means over tokens instead of sums.
            batch: rows computed at a time.

        Raises:
            DataError: a prompt without choices, or not one list per prompt.
        """
        check_rows(routes, len(prompts))
        lists = choice_lists(choices, len(prompts))
        rows_M = torch.tensor([row for row, answers in enumerate(lists) for _ in answers], dtype=torch.long)
        flat = [answer for answers in lists for answer in answers]
        pairs = self.tokens.pairs([prompts[row] for row in rows_M.tolist()], flat, end=True)
        scores_M = None
        if len(flat) > len(prompts) and not (has_router(routes) or self.sees_other_tokens()):
            scores_M = shared_scores(self, pairs, rows_M, routes, batch)
        if scores_M is None:
            scores_M = self._scores(pairs, taken(routes, rows_M), batch)
        if normalised:
            scores_M = scores_M / _lengths(pairs)
        parts = scores_M.split([len(answers) for answers in lists]) if flat else ()
        return [answers[int(part.argmax())] for answers, part in zip(lists, parts, strict=True)]

    # --- generation ----------------------------------------------------------------------------------------------

    def generate(
        self,
        prompts: Sequence[str],
        max_new_tokens: int = 32,
        routes: Routes | None = None,
        *,
        num_beams: int = 1,
        batch: int = BATCH,
    ) -> list[str]:
        """Answers to prompts, greedy or by beam search; every row keeps its adapters over all tokens.

        Keys and values of the tokens so far are kept, but for adapters inside the attention and routes that are
        computed from the text: those compute the whole text anew for every token.

        Args:
            prompts: B prompts; filled on the left inside.
            max_new_tokens: of an answer at most; the prompt is cut at the front where both would be too long.
            routes: who uses which adapter; None: the bare model.
            num_beams: beams per prompt, 1 is greedy.
            batch: prompts at a time, those of similar length together.

        Returns:
            B texts without their end tokens, and without spaces around them.

        Raises:
            ConfigError: fewer than one token or beam.
            DataError: no room for the prompts.
        """
        if max_new_tokens < 1 or num_beams < 1:
            raise ConfigError(f"max_new_tokens={max_new_tokens} and num_beams={num_beams} must be at least 1")
        check_rows(routes, len(prompts))
        ids = self.tokens.prompts(prompts, max_new_tokens)
        order_B = torch.tensor([len(row) for row in ids]).argsort(descending=True)
        options = generation_options(
            self.lm,
            max_new_tokens=max_new_tokens,
            num_beams=num_beams,
            end=self.tokens.end,
            fill=self.tokens.fill,
            use_cache=not (has_router(routes) or self.sees_other_tokens()),
        )
        found: dict[int, str] = {}
        for rows in order_B.split(batch) if ids else ():
            tokens_BN = filled([ids[row] for row in rows.tolist()], left=True).to(self.device)
            beams = taken(routes, rows.repeat_interleave(num_beams))
            for row, text in zip(rows.tolist(), self._generated(tokens_BN, beams, options), strict=True):
                found[row] = text
        return [found[row] for row in range(len(prompts))]

    def _generated(self, tokens_BN: Tensor, routes: Routes | None, options: Any) -> list[str]:
        lm: Any = self.lm
        mask_BN = tokens_BN >= 0
        with torch.no_grad(), self.routed(routes, None):
            made = lm.generate(
                input_ids=tokens_BN.masked_fill(~mask_BN, self.tokens.fill),
                attention_mask=mask_BN.long(),
                generation_config=options,
            )
        return [self.tokens.text(row) for row in made[:, tokens_BN.shape[1] :].tolist()]


def _lengths(pairs: Sequence[Pair]) -> Tensor:
    """Tokens of each answer, float32 [B]."""
    return torch.tensor([float(len(answer)) for _, answer in pairs])
