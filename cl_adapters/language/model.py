"""LanguageModel: a frozen causal language model that answers prompts with adapters, one per task.

Its encoder is that of a :class:`FrozenBackbone`, so the hooks of a bank act in ``generate`` too, and its tasks are the
classes of an :class:`AdapterModel`: keys, predictors, saved models, pools and indexes are those of images.

B prompts, M answers, N tokens, P tokens of a prompt, n of an answer, V vocabulary, D width of the features.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cl_adapters.adapters.base import AdapterType
from cl_adapters.backbones.encode import encode, text_preprocessing
from cl_adapters.backbones.exclusive import exclusive
from cl_adapters.backbones.frozen import FrozenBackbone
from cl_adapters.backbones.hf_forward import Pooling, pad_token_of, vocabulary_of
from cl_adapters.bank.bank import AdapterBank
from cl_adapters.bank.routes import Route, Routes, check_prompts, has_router, summed, taken
from cl_adapters.config import counted
from cl_adapters.errors import ClAdaptersError, ConfigError, DataError
from cl_adapters.language.load import generation_options, open_language_model
from cl_adapters.language.tokens import Ids, Joined, Pair, PromptTokens, choice_lists, joined, padded_ids, positions
from cl_adapters.model.facade import AdapterModel
from cl_adapters.parts.keys import CLASS_KEYS, Keys, KeysConfig, Kind, keys_of
from cl_adapters.predictors.base import Predictor
from cl_adapters.predictors.nearest_key import NearestKey

if TYPE_CHECKING:
    from cl_adapters.index.index import AdapterIndex
    from cl_adapters.pool import AdapterPool

BATCH = 16
"""Rows computed at a time where nothing flows back."""


@dataclass(frozen=True)
class Before:
    """What was computed already of the same texts.

    Attributes:
        tokens_BP: int64 [B, P], padded on the left.
        cache: keys and values of these tokens, as the model gave them; the pass adds its own.
    """

    tokens_BP: Tensor
    cache: Any


class LanguageModel(nn.Module):
    """A causal language model with adapters; only they are ever trained. Answering changes no state.

    ``routes`` say who uses which adapter; None: the bare model.

    Args:
        lm: of transformers, whose encoder is that of ``model.backbone``.
        model: the encoder with a bank of adapters, or without one; its classes are the tasks.

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
        encoder = model.backbone.encoder
        self.tokens = PromptTokens(
            text_preprocessing(model.backbone), _ends(lm), pad_token_of(encoder), vocabulary_of(encoder)
        )
        self._known = frozenset(inspect.signature(type(lm).forward).parameters)

    @classmethod
    def load(
        cls,
        name: str,
        *,
        adapter: AdapterType | None = None,
        blocks: Sequence[int] | None = None,
        keys: KeysConfig | Kind = "prototypes",
        pooling: Pooling | None = None,
        max_length: int | None = None,
        dtype: str | None = None,
        quantization: str | None = None,
    ) -> LanguageModel:
        """Load a language model without any task yet.

        Args:
            name: "hf:" and a folder or hub name of a decoder.
            adapter: type of the adapters of all tasks; None: there will be none.
            blocks: that get adapters; default all.
            keys: what is kept of each task's prompts, to find the adapter for a prompt.
            pooling: of the features behind the keys; see :meth:`FrozenBackbone.load`, as the rest.
            max_length: tokens of prompt and answer together.
            dtype: of the frozen weights.
            quantization: of the frozen encoder.

        Raises:
            BackboneUnavailable: the files, or a package, cannot be had here.
            IncompatibleBackbone: no decoder, or one without sites for such adapters.
            ConfigError: an option that this model does not have.
        """
        backbone = FrozenBackbone.load(
            name, pooling=pooling, max_length=max_length, dtype=dtype, quantization=quantization
        )
        lm = open_language_model(backbone)
        model = AdapterModel(backbone, None if adapter is None else AdapterBank(backbone, adapter, blocks))
        model.parts[CLASS_KEYS] = Keys(KeysConfig.of(keys), backbone.num_features)
        model.predictor = NearestKey()
        return cls(lm, model)

    @classmethod
    def of(cls, model: AdapterModel) -> LanguageModel:
        """Put the head on a model that was loaded from a folder or a pool.

        Raises:
            ConfigError: its backbone was not loaded from transformers.
            IncompatibleBackbone: the backbone is no decoder.
        """
        return cls(open_language_model(model.backbone), model)

    @classmethod
    def from_pool(
        cls,
        pool: AdapterPool | str | Path,
        ids: Sequence[str] | None = None,
        *,
        predictor: Predictor | None = None,
        index: AdapterIndex | str | Path | None = None,
        limit: int = 64,
    ) -> LanguageModel:
        """A language model of a pool's adapters; see :meth:`AdapterModel.from_pool`."""
        return cls.of(AdapterModel.from_pool(pool, ids, predictor=predictor, index=index, limit=limit))

    @property
    def bank(self) -> AdapterBank:
        """The adapters.

        Raises:
            ClAdaptersError: it was loaded without any.
        """
        if self.model.bank is None:
            raise ClAdaptersError("this language model has no adapters: load it with adapter=...")
        return self.model.bank

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self.model.device

    @property
    def tasks(self) -> list[str]:
        """Names of the tasks so far."""
        return [self.model.name_of(label) for label in self.model.classes]

    def train(self, mode: bool = True) -> LanguageModel:
        """Stay in evaluation mode: dropout of adapters follows the generator that is handed over, nothing else."""
        return super().train(False)

    # --- tasks ---------------------------------------------------------------------------------------------------

    def add_task(self, name: str, generator: torch.Generator | None = None) -> int:
        """Begin a task: a class of that name, and with a ``generator`` a fresh adapter that can be trained.

        Returns the newest adapter's slot, -1 where there is none yet.

        Raises:
            DataError: a task of that name is there already.
        """
        if name in self.tasks:
            raise DataError(f"there is a task {name!r} already; each has a name of its own")
        label = max(self.model.classes, default=-1) + 1
        self.model.add_task([label])
        self.model.class_names[label] = name
        if generator is not None:
            self.bank.add_slot(self.bank.fresh(generator))
        self.model.assign_new_slots(self.model.num_tasks - 1)
        return self.model.num_slots - 1

    def finish_task(self, prompts: Sequence[str], generator: torch.Generator) -> None:
        """Freeze all adapters, and take the keys of the newest task from the prompts it was trained on.

        Raises:
            DataError: no prompt.
        """
        for slot in range(self.model.num_slots):
            self.bank.freeze(slot)
        self.model.part(CLASS_KEYS, Keys).add_class(self.features(prompts), generator)

    def features(self, prompts: Sequence[str], batch: int = BATCH) -> Tensor:
        """Features of prompts under the bare backbone, float32 [B, D]: what keys and indexes hold."""
        with self.routed(None, None):
            return encode(self.model.backbone, prompts, batch)

    def route_of(self, prompts: Sequence[str]) -> Route:
        """The adapter of the task whose key is nearest to each prompt; all of them where the model sums them.

        Raises:
            ClAdaptersError: no task was finished yet.
        """
        if self.model.predictor.sums and self.model.num_slots:
            return summed(range(self.model.num_slots), len(prompts), self.device)
        return Route.hard(self.model.slot_of_column[self._nearest(prompts)].to(self.device))

    def task_of(self, prompts: Sequence[str]) -> list[str]:
        """The name of the task whose key is nearest to each prompt.

        Raises:
            ClAdaptersError: no task was finished yet.
        """
        names = self.tasks
        return [names[column] for column in self._nearest(prompts).tolist()]

    def _nearest(self, prompts: Sequence[str]) -> Tensor:
        """Column of the nearest task, int64 [B] on the CPU."""
        return keys_of(self.model).nearest(self.features(prompts), 1)[1][:, 0].cpu()

    # --- likelihood ----------------------------------------------------------------------------------------------

    def loss(
        self,
        prompts: Sequence[str],
        answers: Sequence[str],
        routes: Routes | None = None,
        dropout_generator: torch.Generator | None = None,
    ) -> Tensor:
        """Mean of -log p over the tokens of the answers and their end tokens; prompts count nothing.

        Returns:
            float32 [], differentiable with respect to the adapters.

        Raises:
            DataError: nothing to learn from, or texts that cannot be used (:class:`PromptTokens`).
        """
        if not prompts:
            raise DataError("a batch needs at least one prompt")
        check_prompts(routes, len(prompts))
        batch = joined(self.tokens.pairs(prompts, answers, end=True))
        log_p_BN, counted_BN = self.answer_log_p(batch, routes, dropout_generator)
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

        Raises:
            ConfigError: ``batch`` is less than 1.
        """
        batch = counted(batch, "batch")
        check_prompts(routes, len(prompts))
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

    def _shared_scores(self, pairs: Sequence[Pair], rows_M: Tensor, routes: Routes | None, batch: int) -> Tensor | None:
        """log p of answers, from keys and values of their prompts: what is computed of a prompt is computed once.

        Pair m is an answer to prompt ``rows_M[m]`` (int64) of the B that ``routes`` are of. Neither routers nor
        adapters inside the attention may be in use.

        Returns:
            float32 [M] on the CPU; None where that cannot be: the model keeps no keys and values that can be chosen
            from by row, or long answers cut their prompt elsewhere than short ones.
        """
        prompts: dict[int, Ids] = {}
        for row, (prompt, _) in zip(rows_M.tolist(), pairs, strict=True):
            if prompts.setdefault(row, prompt) != prompt:
                return None
        order_B = torch.tensor(sorted(prompts, key=lambda row: len(prompts[row]), reverse=True))
        found_M = torch.zeros(len(pairs))
        with torch.no_grad():
            for rows in order_B.split(batch):
                tokens_BP = padded_ids([prompts[row] for row in rows.tolist()], left=True).to(self.device)
                output = self.output(tokens_BP, taken(routes, rows), keep=1, use_cache=True)
                before = Before(tokens_BP, getattr(output, "past_key_values", None))
                if not hasattr(before.cache, "reorder_cache"):
                    return None
                log_p_BV = output.logits[:, -1].float().log_softmax(1)
                place_of = {row: place for place, row in enumerate(rows.tolist())}
                own = [column for column, row in enumerate(rows_M.tolist()) if row in place_of]
                own.sort(key=lambda column: len(pairs[column][1]))
                for columns in torch.tensor(own).split(batch):
                    answers = [pairs[column][1] for column in columns.tolist()]
                    answers_Mn = padded_ids(answers, left=False).to(self.device)
                    places_M = torch.tensor([place_of[row] for row in rows_M[columns].tolist()], device=self.device)
                    first_M = log_p_BV[places_M, answers_Mn[:, 0]]
                    rest_M = self._rest(before, places_M, answers_Mn, taken(routes, rows_M[columns]))
                    found_M[columns] = (first_M + rest_M).cpu()
        return found_M

    def _rest(self, before: Before, places_M: Tensor, answers_Mn: Tensor, routes: Routes | None) -> Tensor | float:
        """log p of the tokens behind the first, float32 [M]."""
        keep = answers_Mn.shape[1] - 1
        if not keep:
            return 0.0
        cache = copy.deepcopy(before.cache)  # the pass adds to it
        cache.reorder_cache(places_M)
        own = Before(before.tokens_BP[places_M], cache)
        logits_MnV = self.output(answers_Mn[:, :-1], routes, keep=keep, before=own).logits[:, -keep:]
        loss_Mn = F.cross_entropy(
            logits_MnV.float().flatten(0, 1), answers_Mn[:, 1:].flatten(), ignore_index=-1, reduction="none"
        ).view(-1, keep)
        return -loss_Mn.sum(1)

    def answer_log_p(
        self, batch: Joined, routes: Routes | None, dropout_generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        """log p of each token of the answers given all before it.

        Returns:
            float32 [B, n], 0 beside the answers, and which places hold tokens of answers, bool [B, n]. n is the number
            of columns from the first of an answer.
        """
        batch = batch.to(self.device)
        first = batch.first
        keep = batch.tokens_BN.shape[1] - first + 1
        logits_BnV = self.output(batch.tokens_BN, routes, dropout_generator, keep=keep).logits[:, -keep:-1]
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
            ConfigError: ``batch`` is less than 1.
            DataError: a prompt without choices, or not one list per prompt.
        """
        batch = counted(batch, "batch")
        check_prompts(routes, len(prompts))
        lists = choice_lists(choices, len(prompts))
        rows_M = torch.tensor([row for row, answers in enumerate(lists) for _ in answers], dtype=torch.long)
        flat = [answer for answers in lists for answer in answers]
        pairs = self.tokens.pairs([prompts[row] for row in rows_M.tolist()], flat, end=True)
        scores_M = None
        if len(flat) > len(prompts) and not (has_router(routes) or self.sees_other_tokens()):
            scores_M = self._shared_scores(pairs, rows_M, routes, batch)
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
            prompts: B prompts; padded on the left inside.
            max_new_tokens: of an answer at most; the prompt is cut at the front where both would be too long.
            routes: who uses which adapter; None: the bare model.
            num_beams: beams per prompt, 1 is greedy.
            batch: prompts at a time, those of similar length together.

        Returns:
            B texts without their end tokens, and without spaces around them.

        Raises:
            ConfigError: fewer than one token, beam or prompt at a time.
            DataError: no room for the prompts.
        """
        if max_new_tokens < 1 or num_beams < 1:
            raise ConfigError(f"max_new_tokens={max_new_tokens} and num_beams={num_beams} must be at least 1")
        batch = counted(batch, "batch")
        check_prompts(routes, len(prompts))
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
            tokens_BN = padded_ids([ids[row] for row in rows.tolist()], left=True).to(self.device)
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

    # --- one pass ------------------------------------------------------------------------------------------------

    def sees_other_tokens(self) -> bool:
        """Whether the adapters are inside the attention, where what they add to a token depends on those before it."""
        return self.model.bank is not None and any(site.kind == "attention" for site in self.model.bank.sites)

    def output(
        self,
        tokens_BN: Tensor,
        routes: Routes | None,
        dropout_generator: torch.Generator | None = None,
        *,
        keep: int,
        use_cache: bool = False,
        before: Before | None = None,
    ) -> Any:
        """The model's own output for texts or their continuations.

        Args:
            tokens_BN: int64 [B, N], -1 where there is no token.
            routes: who uses which adapter.
            dropout_generator: generator of the adapters' dropout masks.
            keep: columns whose logits are wanted, the last ones; some models give more.
            use_cache: give keys and values back.
            before: what stands before the tokens.
        """
        whole_BM = tokens_BN if before is None else torch.cat([before.tokens_BP, tokens_BN], 1)
        mask_BM, known = whole_BM >= 0, self._known
        options: dict[str, Any] = {"use_cache": use_cache or before is not None}
        if before is not None:
            options["past_key_values"] = before.cache
        if not bool(mask_BM[:, 0].all()) and "position_ids" in known:
            options["position_ids"] = positions(whole_BM)[:, -tokens_BN.shape[1] :]
        options |= {name: keep for name in ("logits_to_keep", "num_logits_to_keep") if name in known}
        with self.routed(routes, dropout_generator):
            return self.lm(
                input_ids=tokens_BN.masked_fill(tokens_BN < 0, self.tokens.fill),
                attention_mask=mask_BM.long(),
                **options,
            )

    @contextmanager
    def routed(self, routes: Routes | None, dropout_generator: torch.Generator | None) -> Iterator[None]:
        """The routed adapters act inside, and know which places of each call of the encoder hold tokens."""
        backbone, bank = self.model.backbone, self.model.bank
        if bank is None and routes is not None:
            raise ClAdaptersError("this language model has no adapters to route to")

        def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            mask, ids = kwargs.get("attention_mask"), args[0] if args else kwargs.get("input_ids")
            fits = isinstance(mask, Tensor) and isinstance(ids, Tensor) and mask.shape == ids.shape
            backbone.token_mask = mask.bool() if isinstance(mask, Tensor) and fits else None

        with exclusive(backbone.encoder), nullcontext() if bank is None else bank.route(routes, dropout_generator):
            outer = backbone.token_mask
            handle = backbone.encoder.register_forward_pre_hook(note, with_kwargs=True)
            try:
                yield
            finally:
                handle.remove()
                backbone.token_mask = outer


def _lengths(pairs: Sequence[Pair]) -> Tensor:
    """Tokens of each answer, float32 [B]."""
    return torch.tensor([float(len(answer)) for _, answer in pairs])


def _ends(lm: Any) -> list[int]:
    """Ids of the tokens that end an answer, from the model's own files."""
    found = getattr(getattr(lm, "generation_config", None), "eos_token_id", None)
    return [] if found is None else [int(token) for token in (found if isinstance(found, list) else [found])]
