"""FrozenBackbone: a pre-trained encoder that is never trained, with its preprocessing and its identity."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from cl_adapters.batches import Inputs
from cl_adapters.errors import ClAdaptersError, ConfigError, IncompatibleBackbone
from cl_adapters.preprocessing import Preprocessing
from cl_adapters.site_families import find_family, find_sites
from cl_adapters.sites import Site

Pooling = Literal["encoder", "cls", "mean"]


class _Entered(Exception):
    """Ends a forward pass at the input of a block."""

    def __init__(self, hidden: Tensor) -> None:
        super().__init__()
        self.hidden = hidden


class FrozenBackbone(nn.Module):
    """A frozen encoder: always in evaluation mode, no parameter requires a gradient.

    Make one with :meth:`load` (by name) or :meth:`wrap` (your own module).

    Attributes:
        encoder: the wrapped module.
        name: what it was loaded as, for instance "timm:deit_tiny_patch16_224".
        source: the arguments of :meth:`load` that give the same backbone again; empty for a wrapped module.
        num_features: width D of the features.
        preprocessing: how images become inputs; None where inputs are not images.
        pooling: "encoder" (the module pools), "cls" (first token) or "mean" (over the attention mask).
    """

    def __init__(
        self,
        encoder: nn.Module,
        *,
        name: str,
        num_features: int,
        preprocessing: Preprocessing | None = None,
        pooling: Pooling = "encoder",
        sites: Sequence[Site] | None = None,
        source: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.encoder = encoder.requires_grad_(False).eval()
        self.name = name
        self.num_features = num_features
        self.preprocessing = preprocessing
        self.pooling = pooling
        self.source = dict(source or {})
        self.register_buffer("_place", torch.empty(0), persistent=False)  # a module without weights has a device too
        self._sites = None if sites is None else tuple(sites)
        self._fingerprint: str | None = None

    @classmethod
    def load(
        cls,
        name: str,
        *,
        weights: str | Path | None = None,
        img_size: int | None = None,
        crop_pct: float | None = None,
    ) -> FrozenBackbone:
        """Load a backbone by name.

        Args:
            name: an embedded one ("vit_glyph_tiny"), or "timm:" and any timm model name with its full tag.
            weights: a local .safetensors file in timm's naming, instead of the model hub.
            img_size: another input side than the model's own; position embeddings are resampled.
            crop_pct: another centre-crop fraction than the model's own.

        Raises:
            UnknownName: no such backbone.
            BackboneUnavailable: the weights cannot be had here; says what to do.
            IncompatibleBackbone: the weights do not fit the model.
        """
        from cl_adapters.backbone_sources import open_source

        encoder, preprocessing = open_source(name, weights=weights, img_size=img_size)
        if crop_pct is not None:
            try:
                preprocessing = dataclasses.replace(preprocessing, crop_pct=crop_pct)
            except ValueError as error:
                raise ConfigError(str(error)) from error
        source = {
            "name": name,
            "weights": None if weights is None else str(Path(weights).resolve()),
            "img_size": img_size,
            "crop_pct": crop_pct,
        }
        return cls.wrap(encoder, name=name, preprocessing=preprocessing, source=source)

    @classmethod
    def wrap(
        cls,
        module: nn.Module,
        *,
        name: str | None = None,
        num_features: int | None = None,
        preprocessing: Preprocessing | None = None,
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
            sites: where adapters attach; default found by structure (:mod:`cl_adapters.sites`).
            source: set by :meth:`load`.

        Raises:
            IncompatibleBackbone: the feature width cannot be found.
        """
        if isinstance(module, FrozenBackbone):
            return module
        config = getattr(module, "config", None)
        width = num_features or getattr(module, "num_features", None) or getattr(config, "hidden_size", None)
        if not isinstance(width, int):
            raise IncompatibleBackbone(
                f"cannot tell the feature width of {type(module).__name__}: pass num_features=... to "
                "FrozenBackbone.wrap"
            )
        if pooling is None:
            pooling = "mean" if hasattr(config, "hidden_size") else "encoder"
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
            x: images float32 [B, C, H, W], or whatever tensor or mapping of tensors the encoder takes.

        Returns:
            float [B, D]; differentiable with respect to attached adapters.

        Raises:
            ClAdaptersError: the input's shape is not the encoder's.
        """
        if isinstance(x, Tensor):
            self._check_image(x)
            return self._pooled(self._encode(x), None)
        return self._pooled(self.encoder(**x), x.get("attention_mask"))

    features = forward

    def sites(self, kind: str = "ffn_parallel") -> tuple[Site, ...]:
        """Sites of that kind, from the first block to the last.

        Raises:
            IncompatibleBackbone: none is known for this structure.
        """
        if self._sites is None:
            return find_sites(self.encoder, kind)
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
        return len(find_family(self.encoder).find_blocks(self.encoder))

    def enter(self, x: Inputs, block: int) -> Tensor:
        """The input of one block: everything before it is computed, nothing after.

        Args:
            x: as for :meth:`forward`.
            block: index of the block, 0-based; ``depth`` gives the features.

        Returns:
            h, [B, N, D] for a ViT.
        """
        return self._until(block, lambda: self.forward(x))

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
        if until is not None:
            return self._until(until, lambda: self.resume(h, block))
        family = find_family(self.encoder)
        if block == len(family.find_blocks(self.encoder)):
            return h
        self.check_resumable()
        assert family.resume is not None
        return family.resume(self.encoder, h, block)

    @property
    def fingerprint(self) -> str:
        """SHA-256 over every weight and buffer, the preprocessing and the pooling; computed once."""
        if self._fingerprint is None:
            digest = hashlib.sha256()
            for key, value in sorted(self.encoder.state_dict().items()):
                digest.update(f"{key}:{value.dtype}:{tuple(value.shape)}".encode())
                digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
            recipe = None if self.preprocessing is None else dataclasses.asdict(self.preprocessing)
            digest.update(json.dumps([recipe, self.pooling], sort_keys=True).encode())
            self._fingerprint = digest.hexdigest()
        return self._fingerprint

    def check_resumable(self) -> None:
        """Check that :meth:`resume` works with this backbone.

        Raises:
            IncompatibleBackbone: it does not; activations before a block cannot be cached.
        """
        family = find_family(self.encoder)
        if not family.resumable(self.encoder) or self.pooling != "encoder":
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

    def _until(self, block: int, run: Callable[[], Tensor]) -> Tensor:
        """What ``run`` returns, or the input of a block, at which it ends."""
        blocks = find_family(self.encoder).find_blocks(self.encoder)
        if block == len(blocks):
            return run()

        def stop(module: nn.Module, args: tuple[Any, ...]) -> None:
            raise _Entered(args[0])

        handle = blocks[block][1].register_forward_pre_hook(stop)
        try:
            run()
        except _Entered as reached:
            return reached.hidden
        finally:
            handle.remove()
        raise IncompatibleBackbone(f"block {block} of {self.name!r} was never reached")

    def _encode(self, x: Tensor) -> Any:
        encoder: Any = self.encoder
        if hasattr(encoder, "forward_features") and hasattr(encoder, "forward_head"):
            return encoder.forward_head(encoder.forward_features(x), pre_logits=True)  # timm: leave the classifier out
        return encoder(x)

    def _pooled(self, output: Any, mask: Tensor | None) -> Tensor:
        if self.pooling == "encoder":
            assert isinstance(output, Tensor)
            return output
        tokens: Tensor = output.last_hidden_state
        if self.pooling == "cls":
            return tokens[:, 0]
        if mask is None:
            return tokens.mean(1)
        weight = mask.unsqueeze(-1).to(tokens.dtype)
        return (tokens * weight).sum(1) / weight.sum(1).clamp_min(1)

    def _check_image(self, x: Tensor) -> None:
        if self.preprocessing is None:
            return
        expected = self.preprocessing.input_size
        if x.ndim != 4 or tuple(x.shape[1:]) != expected:
            raise ClAdaptersError(
                f"backbone {self.name!r} takes images [B, {', '.join(map(str, expected))}], got {list(x.shape)}; "
                "use backbone.preprocessing.eval_transform() on each image"
            )
