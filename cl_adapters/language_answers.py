"""Answering: how likely a frozen causal language model finds an answer, which of some it takes, and what it writes.

B prompts, N tokens, V vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cl_adapters.answers import text_preprocessing
from cl_adapters.errors import ClAdaptersError, ConfigError, DataError
from cl_adapters.language_routes import check_rows, has_router, taken
from cl_adapters.language_source import generation_options
from cl_adapters.language_tokens import Joined, PromptTokens, choice_lists, filled, joined, positions
from cl_adapters.model import AdapterModel
from cl_adapters.routes import Routes

BATCH = 16
"""Rows computed at a time where nothing flows back."""


class Answering(nn.Module):
    """What a causal language model with adapters says to prompts; changes no state.

    Args:
        lm: of transformers, whose encoder is that of ``model.backbone``.
        model: the encoder with a bank of adapters, or without one.

    Attributes:
        tokens: how prompts and answers become tokens.

    Raises:
        ClAdaptersError: two different encoders.
    """

    def __init__(self, lm: nn.Module, model: AdapterModel) -> None:
        super().__init__()
        if getattr(lm, "base_model", None) is not model.backbone.encoder:
            raise ClAdaptersError(
                "the language model's encoder is not that of the backbone; use LanguageModel.of(model)"
            )
        self.lm = lm
        self.model = model
        self.tokens = PromptTokens(text_preprocessing(model.backbone), _ends(lm))
        self._options = frozenset(inspect.signature(type(lm).forward).parameters)

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self.model.device

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
        order_B = torch.tensor([len(prompt) + len(answer) for prompt, answer in pairs]).argsort(descending=True)
        found_B = torch.zeros(len(pairs))
        with torch.no_grad():
            for rows in order_B.split(batch) if pairs else ():
                part = joined([pairs[row] for row in rows.tolist()])
                log_p_BN, counted_BN = self.answer_log_p(part, taken(routes, rows))
                total_B = log_p_BN.sum(1)
                found_B[rows] = (total_B / counted_BN.sum(1) if normalised else total_B).cpu()
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
        logits_BnV = self._logits(batch.tokens_BN, routes, noise, keep=batch.tokens_BN.shape[1] - first + 1)[:, :-1]
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
        scores_M = self.log_likelihood(
            [prompts[row] for row in rows_M.tolist()],
            flat,
            taken(routes, rows_M),
            normalised=normalised,
            end=True,
            batch=batch,
        )
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
            use_cache=not (has_router(routes) or self._sees_other_tokens()),
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
        with torch.no_grad(), self._pass(routes, None):
            made = lm.generate(
                input_ids=tokens_BN.masked_fill(~mask_BN, self.tokens.fill),
                attention_mask=mask_BN.long(),
                generation_config=options,
            )
        return [self.tokens.text(row) for row in made[:, tokens_BN.shape[1] :].tolist()]

    def _sees_other_tokens(self) -> bool:
        """Whether the adapters are inside the attention, where what they add to a token depends on those before it."""
        return self.model.bank is not None and any(site.kind == "attention" for site in self.model.bank.sites)

    # --- one pass ------------------------------------------------------------------------------------------------

    def _logits(self, tokens_BN: Tensor, routes: Routes | None, noise: torch.Generator | None, keep: int) -> Tensor:
        """Logits [B, keep, V] of the last columns."""
        mask_BN = tokens_BN >= 0
        known = self._options
        options: dict[str, Any] = {"use_cache": False}
        if not bool(mask_BN[:, 0].all()) and "position_ids" in known:
            options["position_ids"] = positions(tokens_BN)
        options |= {name: keep for name in ("logits_to_keep", "num_logits_to_keep") if name in known}
        with self._pass(routes, noise):
            output = self.lm(
                input_ids=tokens_BN.masked_fill(~mask_BN, self.tokens.fill), attention_mask=mask_BN.long(), **options
            )
        logits: Tensor = output.logits
        return logits[:, -keep:]

    @contextmanager
    def _pass(self, routes: Routes | None, noise: torch.Generator | None) -> Iterator[None]:
        """The routed adapters act inside, and know which places of each call of the encoder hold tokens."""
        backbone, bank = self.model.backbone, self.model.bank
        if bank is None and routes is not None:
            raise ClAdaptersError("this language model has no adapters to route to")
        outer = backbone.token_mask

        def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            mask, ids = kwargs.get("attention_mask"), args[0] if args else kwargs.get("input_ids")
            fits = isinstance(mask, Tensor) and isinstance(ids, Tensor) and mask.shape == ids.shape
            backbone.token_mask = mask.bool() if isinstance(mask, Tensor) and fits else None

        handle = backbone.encoder.register_forward_pre_hook(note, with_kwargs=True)
        try:
            if bank is None:
                yield
            else:
                with bank.route(routes, noise):
                    yield
        finally:
            handle.remove()
            backbone.token_mask = outer


def _ends(lm: Any) -> list[int]:
    """Ids of the tokens that end an answer, from the model's own files."""
    found = getattr(getattr(lm, "generation_config", None), "eos_token_id", None)
    return [] if found is None else [int(token) for token in (found if isinstance(found, list) else [found])]
