"""FrozenBackbone: a pre-trained encoder that is never trained, with its preprocessing and its identity."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cl_adapters.backbones.exclusive import exclusive
from cl_adapters.backbones.fingerprint import fingerprint_of
from cl_adapters.backbones.hf_forward import Pooling, check_pooling, hidden_size_of, pooled_features
from cl_adapters.backbones.inputs import Inputs
from cl_adapters.backbones.partial import ForwardPass, begin_pass, find_tuple_size, resume_pass
from cl_adapters.backbones.preprocessing import Preprocessing
from cl_adapters.backbones.text import TextPreprocessing
from cl_adapters.errors import ClAdaptersError, IncompatibleBackbone
from cl_adapters.sites.families import find_family
from cl_adapters.sites.sites import Site

__all__ = ["FrozenBackbone", "Pooling"]


class FrozenBackbone(nn.Module):
    """A frozen encoder: always in evaluation mode, no parameter requires a gradient.

    Make one with :meth:`load` (by name) or :meth:`wrap` (your own module). It may be shared by models, indexes and
    threads: their passes run one after the other.

    Attributes:
        encoder: the wrapped module.
        name: what it was loaded as, for instance "timm:deit_tiny_patch16_224".
        source: the arguments of :meth:`load` that give the same backbone again; empty for a wrapped module.
        num_features: width D of the features.
        preprocessing: how images or texts become inputs; None where inputs are neither.
        pooling: "encoder" (the module pools), "cls" (first token), "mean" (over the tokens) or "last" (last token).
        token_mask: during a forward pass over texts, bool [B, n]: which places hold tokens; else None.
    """

    def __init__(
        self,
        encoder: nn.Module,
        *,
        name: str,
        num_features: int,
        preprocessing: Preprocessing | TextPreprocessing | None = None,
        pooling: Pooling = "encoder",
        sites: Sequence[Site] | None = None,
        source: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        check_pooling(pooling)
        self.encoder = encoder.requires_grad_(False).eval()
        self.name = name
        self.num_features = num_features
        self.preprocessing = preprocessing
        self.pooling = pooling
        self.source = dict(source or {})
        self.register_buffer("_place", torch.empty(0), persistent=False)  # a module without weights has a device too
        self._sites = None if sites is None else tuple(sites)
        self._fingerprint: str | None = None
        self._known_tuple_size: tuple[int | None] | None = None  # of _tuple_size, once it is known
        self.token_mask: Tensor | None = None

    @classmethod
    def load(
        cls,
        name: str,
        *,
        weights: str | Path | None = None,
        img_size: int | None = None,
        crop_pct: float | None = None,
        pooling: Pooling | None = None,
        max_length: int | None = None,
        dtype: str | None = None,
        quantization: str | None = None,
    ) -> FrozenBackbone:
        """Load a backbone by name.

        Args:
            name: an embedded one ("vit_glyph_tiny"), "timm:" and a timm model name with its full tag, or "hf:" and a
                folder or hub name of a transformers model of texts, images or spectrograms.
            weights: a local .safetensors file in timm's naming, instead of the model hub.
            img_size: another input side than the model's own; position embeddings are resampled.
            crop_pct: another centre-crop fraction than the model's own.
            pooling: of a transformers model, "encoder", "cls", "mean" or "last"; default for texts "last" where a token
                sees only those before it and else "mean", for images "cls" where there is a class token, else "mean".
            max_length: tokens kept of a text; default what the model takes, at most 512.
            dtype: of the frozen weights of a transformers model: "float32" (default), "bfloat16", "float16", or "auto":
                bfloat16 if this machine has a GPU that computes with it, else float32. Half the memory, faster where
                the hardware has it, slower elsewhere; features are float32 all the same. No device is chosen here.
            quantization: "int8" or "nf4": such weights in 8 or 4 bit, by bitsandbytes (or torchao, optimum-quanto).

        Raises:
            UnknownName: no such backbone.
            BackboneUnavailable: the weights, or a package, cannot be had here; says what to do.
            IncompatibleBackbone: the weights do not fit the model.
            ConfigError: an option that this backbone does not have.
        """
        from cl_adapters.backbones.load import open_source

        options: dict[str, Any] = {
            "pooling": pooling,
            "max_length": max_length,
            "dtype": dtype,
            "quantization": quantization,
        }
        opened = open_source(name, weights=weights, img_size=img_size, crop_pct=crop_pct, **options)
        return cls.wrap(
            opened.encoder,
            name=name,
            preprocessing=opened.preprocessing,
            pooling=opened.pooling,
            source=opened.source,
        )

    @classmethod
    def wrap(
        cls,
        module: nn.Module,
        *,
        name: str | None = None,
        num_features: int | None = None,
        preprocessing: Preprocessing | TextPreprocessing | None = None,
        pooling: Pooling | None = None,
        sites: Sequence[Site] | None = None,
        source: Mapping[str, Any] | None = None,
    ) -> FrozenBackbone:
        """Freeze your own module (it is used as it is, not copied).

        Args:
            module: maps inputs to features [B, D], or is a timm model (its classifier is left out), or returns
                an object with ``last_hidden_state`` [B, N, D] (transformers).
            name: for messages and files; default the class name.
            num_features: D; default the module's ``num_features`` or ``config.hidden_size``.
            preprocessing: needed only to predict image files.
            pooling: default "encoder", or "mean" for a transformers model.
            sites: where adapters attach; default found by structure (:mod:`cl_adapters.sites.sites`).
            source: set by :meth:`load`.

        Raises:
            IncompatibleBackbone: the feature width cannot be found.
        """
        if isinstance(module, FrozenBackbone):
            return module
        width = num_features or getattr(module, "num_features", None) or hidden_size_of(module)
        if not isinstance(width, int):
            raise IncompatibleBackbone(
                f"cannot tell the feature width of {type(module).__name__}: pass num_features=... to "
                "FrozenBackbone.wrap"
            )
        if pooling is None:
            pooling = "encoder" if hidden_size_of(module) is None else "mean"
        return cls(
            module,
            name=name or type(module).__name__,
            num_features=width,
            preprocessing=preprocessing,
            pooling=pooling,
            sites=sites,
            source=source,
        )

    def forward(self, x: Inputs) -> Tensor:
        """Features.

        Args:
            x: images float32 [B, C, H, W]; texts as token ids int64 [B, N], -1 where there is none, or as what a
                tokenizer of transformers gives; or whatever tensor or mapping of tensors the encoder takes.

        Returns:
            float [B, D], of a text the same in any batch; differentiable with respect to attached adapters.

        Raises:
            ClAdaptersError: the input's shape is not the encoder's.
        """
        return self._finish(begin_pass(self.encoder, x, self.preprocessing, self.name))

    features = forward

    def sites(self, kind: str = "ffn_parallel") -> tuple[Site, ...]:
        """Sites of that kind, from the first block to the last.

        Raises:
            IncompatibleBackbone: none is known for this structure.
        """
        if self._sites is None:
            return find_family(self.encoder).sites(self.encoder, kind)
        found = tuple(site for site in self._sites if site.kind == kind)
        if not found:
            raise IncompatibleBackbone(f"backbone {self.name!r} was given no site of kind {kind!r}")
        return found

    @property
    def depth(self) -> int:
        """Number of blocks.

        Raises:
            IncompatibleBackbone: the structure is not known.
        """
        return len(self._blocks())

    def enter(self, x: Inputs, block: int) -> Tensor:
        """The input of one block: everything before it is computed, nothing after.

        Args:
            x: as for :meth:`forward`.
            block: index of the block, 0-based; ``depth`` gives the features.

        Returns:
            h, [B, N, D] for a ViT; for texts [B, N, D] too, with NaN behind the last token and N that of ``x``.
        """
        return self._finish(begin_pass(self.encoder, x, self.preprocessing, self.name), block)

    def resume(self, h: Tensor, block: int, until: int | None = None) -> Tensor:
        """Go on from the input of one block; ``resume(enter(x, b), b)`` is ``forward(x)``.

        Args:
            h: input of the block, or the features where ``block`` is ``depth``.
            block: index of the block.
            until: stop at the input of that later block; default the features.

        Returns:
            Features [B, D], or the input of block ``until``.

        Raises:
            IncompatibleBackbone: it is not known how this structure goes on from a block.
        """
        resume, blocks = find_family(self.encoder).resume, self._blocks()
        if block == len(blocks):
            return h
        self.check_resumable()
        if resume is not None:
            return self._finish(ForwardPass(partial(resume, self.encoder, h, block)), until)
        rest = resume_pass(self.encoder, blocks, h, block, self._tuple_size() or 0, self.preprocessing)
        return self._finish(rest, until)

    @property
    def fingerprint(self) -> str:
        """SHA-256 over every weight and buffer, the preprocessing (with the tokenizer) and the pooling."""
        if self._fingerprint is None:
            self._fingerprint = fingerprint_of(self.encoder, self.preprocessing, self.pooling)
        return self._fingerprint

    def check_resumable(self) -> None:
        """Check that :meth:`resume` works with this backbone.

        Raises:
            IncompatibleBackbone: it does not; activations before a block cannot be cached.
        """
        family = find_family(self.encoder)
        known = family.resumable(self.encoder) and self.pooling == "encoder"
        if not known and (family.resume is not None or self._tuple_size() is None):
            raise IncompatibleBackbone(
                f"backbone {self.name!r} ({family.name}) cannot be entered at a block, so nothing can be cached: set "
                "cached_views=0"
            )

    def check_frozen(self) -> None:
        """Check that nothing below the adapters asks for a gradient (it would double the cost of a step).

        Raises:
            ClAdaptersError: names the first tensor that does.
        """
        for key, value in [*self.encoder.named_parameters(), *self.encoder.named_buffers()]:
            if value.requires_grad:
                raise ClAdaptersError(
                    f"backbone tensor {key!r} requires a gradient; a FrozenBackbone is never trained. "
                    "Call backbone.requires_grad_(False), and do not hand its parameters to an optimizer"
                )

    def train(self, mode: bool = True) -> FrozenBackbone:
        """Stay in evaluation mode, whatever is asked: dropout and drop-path of the backbone stay off."""
        return super().train(False)

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return next(chain(self.encoder.parameters(), self.buffers())).device

    def _finish(self, begun: ForwardPass, stop: int | None = None) -> Tensor:
        """The features, or the input of a block (``depth``: the features)."""
        blocks = [] if stop is None else self._blocks()
        with exclusive(self.encoder):
            outer, self.token_mask = self.token_mask, None if begun.width is None else begun.mask_BN
            try:
                if stop is None or stop == len(blocks):
                    return pooled_features(begun.run(), self.pooling, begun.mask_BN)
                return begun.until(blocks[stop])
            finally:
                self.token_mask = outer

    def _tuple_size(self) -> int | None:
        """How the blocks of an encoder of transformers return activations; None: it cannot be entered."""
        if self._known_tuple_size is None:
            with exclusive(self.encoder):
                found = find_tuple_size(self.encoder, self._blocks(), self.pooling, self.preprocessing)
            self._known_tuple_size = (found,)
        return self._known_tuple_size[0]

    def _blocks(self) -> list[nn.Module]:
        return [module for _, module in find_family(self.encoder).find_blocks(self.encoder)]
