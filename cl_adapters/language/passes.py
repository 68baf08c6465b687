"""One pass of a causal language model with adapters, of whole texts or behind keys and values that are known.

B prompts, N tokens, P tokens before them, V vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cl_adapters.backbones.hf_forward import filling_of, vocabulary_of
from cl_adapters.bank.routes import Routes
from cl_adapters.errors import ClAdaptersError
from cl_adapters.language.tokens import PromptTokens, positions
from cl_adapters.model.facade import AdapterModel
from cl_adapters.model.predict import text_preprocessing


@dataclass(frozen=True)
class Before:
    """What was computed already of the same texts.

    Attributes:
        tokens_BP: int64 [B, P], filled on the left.
        cache: keys and values of these tokens, as the model gave them; the pass adds its own.
    """

    tokens_BP: Tensor
    cache: Any


class Passes(nn.Module):
    """A causal language model whose encoder is that of a model with adapters.

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
        encoder = model.backbone.encoder
        self.tokens = PromptTokens(
            text_preprocessing(model.backbone), _ends(lm), filling_of(encoder), vocabulary_of(encoder)
        )
        self._known = frozenset(inspect.signature(type(lm).forward).parameters)

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self.model.device

    def sees_other_tokens(self) -> bool:
        """Whether the adapters are inside the attention, where what they add to a token depends on those before it."""
        return self.model.bank is not None and any(site.kind == "attention" for site in self.model.bank.sites)

    def output(
        self,
        tokens_BN: Tensor,
        routes: Routes | None,
        noise: torch.Generator | None = None,
        *,
        keep: int,
        use_cache: bool = False,
        before: Before | None = None,
    ) -> Any:
        """The model's own output for texts or their continuations.

        Args:
            tokens_BN: int64 [B, N], -1 where there is no token.
            routes: who uses which adapter.
            noise: generator of the adapters' dropout masks.
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
        with self.routed(routes, noise):
            return self.lm(
                input_ids=tokens_BN.masked_fill(tokens_BN < 0, self.tokens.fill),
                attention_mask=mask_BM.long(),
                **options,
            )

    @contextmanager
    def routed(self, routes: Routes | None, noise: torch.Generator | None) -> Iterator[None]:
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
