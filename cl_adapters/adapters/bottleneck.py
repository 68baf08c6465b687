"""The bottleneck adapter of AdaptFormer, in the arrangements that MOS, SEMA and LAE use.

delta(x) = s * (W_up . drop(act(W_down x + b_down)) + b_up)
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from cl_adapters.adapters.base import AdapterType, adapters
from cl_adapters.sites import Site


@adapters.register("bottleneck")
@dataclass(frozen=True, kw_only=True)
class Bottleneck(AdapterType):
    """Bottleneck adapter (Chen et al. 2022, AdaptFormer, eq. 3-4; the defaults are those of MOS).

    Attributes:
        bottleneck: width r of the bottleneck.
        place: branch of the feed-forward network ("ffn") or of the attention ("attn").
        mode: "parallel" to the branch, "sequential" behind it, or "before" it. Parallel, the input is that of MOS and
            SEMA at the feed-forward network (residual stream before its norm), of LAE at the attention (after norm).
        scale: s; also scales b_up.
        learn_scale: s is a trained number that starts at ``scale``.
        layer_norm: LayerNorm on the adapter's "in"put, "out"put, or "none".
        activation: "relu" or "gelu".
        dropout: rate on the bottleneck while training.
        init_scheme: "zero_up" (W_down Kaiming-uniform with a = sqrt 5, all else 0: the identity at the start) or
            "normal" (both matrices N(0, 0.02), biases 0).
    """

    summary: ClassVar[str] = "AdaptFormer bottleneck, parallel or sequential to feed-forward network or attention"

    bottleneck: int = 16
    place: Literal["ffn", "attn"] = "ffn"
    mode: Literal["parallel", "sequential", "before"] = "parallel"
    scale: float = 0.1
    learn_scale: bool = False
    layer_norm: Literal["none", "in", "out"] = "none"
    activation: Literal["relu", "gelu"] = "relu"
    dropout: float = 0.1
    init_scheme: Literal["zero_up", "normal"] = "zero_up"

    def __post_init__(self) -> None:
        if self.bottleneck < 1:
            raise ValueError(f"bottleneck must be at least 1, got {self.bottleneck}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout}")

    @property
    def site_kinds(self) -> tuple[str, ...]:
        """Such as "ffn_parallel" or "attn_sequential"."""
        return (f"{self.place}_{self.mode}",)

    def shapes(self, site: Site) -> dict[str, tuple[int, ...]]:
        """down [r, D], down_bias [r], up [D, r], up_bias [D]; with options scale [1], norm and norm_bias [D]."""
        r, width = self.bottleneck, site.width
        shapes: dict[str, tuple[int, ...]] = {"down": (r, width), "down_bias": (r,)}
        shapes |= {"up": (width, r), "up_bias": (width,)}
        if self.learn_scale:
            shapes["scale"] = (1,)
        if self.layer_norm != "none":
            shapes |= {"norm": (width,), "norm_bias": (width,)}
        return shapes

    def init(self, site: Site, generator: torch.Generator) -> dict[str, Tensor]:
        """Fresh tensors; see the attribute ``init_scheme``."""
        params = {name: torch.zeros(shape) for name, shape in self.shapes(site).items()}
        if self.init_scheme == "zero_up":
            bound = 1 / math.sqrt(site.width)  # Kaiming-uniform with a = sqrt(5)
            params["down"].uniform_(-bound, bound, generator=generator)
        else:
            params["down"].normal_(0, 0.02, generator=generator)
            params["up"].normal_(0, 0.02, generator=generator)
        if "scale" in params:
            params["scale"].fill_(self.scale)
        if "norm" in params:
            params["norm"].fill_(1)
        return params

    def apply(
        self,
        x_BND: Tensor,
        params: Mapping[str, Tensor],
        noise: torch.Generator | None = None,
        y_BNO: Tensor | None = None,
    ) -> Tensor:
        """delta_BND; one matrix product per projection, also when every sample has its own adapter."""
        if self.layer_norm == "in":
            x_BND = self._norm(x_BND, params)
        hidden_BNR = _affine(x_BND, params["down"], params["down_bias"])
        hidden_BNR = F.relu(hidden_BNR) if self.activation == "relu" else F.gelu(hidden_BNR)
        if noise is not None and self.dropout > 0:
            keep = torch.empty_like(hidden_BNR).bernoulli_(1 - self.dropout, generator=noise)
            hidden_BNR = hidden_BNR * keep.div_(1 - self.dropout)
        # scaling the small matrix is cheaper than scaling the output, and s scales b_up as well
        scale = params["scale"] if self.learn_scale else self.scale
        up, up_bias = (params["up"] * _lift(scale, 2), params["up_bias"] * _lift(scale, 1))
        delta_BND = _affine(hidden_BNR, up, up_bias)
        return self._norm(delta_BND, params) if self.layer_norm == "out" else delta_BND

    def _norm(self, x_BND: Tensor, params: Mapping[str, Tensor]) -> Tensor:
        plain = F.layer_norm(x_BND, x_BND.shape[-1:])
        return plain * params["norm"].unsqueeze(-2) + params["norm_bias"].unsqueeze(-2)


def _affine(x_BNI: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """``x W^T + b`` with weight [O, I], or [B, O, I] for one weight per sample."""
    if weight.ndim == 2:
        return F.linear(x_BNI, weight, bias)
    return torch.baddbmm(bias.unsqueeze(-2), x_BNI, weight.mT)


def _lift(scale: float | Tensor, dims: int) -> float | Tensor:
    """Scale of shape [1] or [B, 1] made to multiply a tensor of ``dims`` own dimensions."""
    if not isinstance(scale, Tensor) or scale.ndim == 1:
        return scale
    return scale.reshape(-1, *([1] * dims))
