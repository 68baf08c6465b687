"""The bottleneck adapter, in the arrangements that AdaptFormer, MOS, SEMA, LAE and the text papers use.

delta(x) = s * (W_up . drop(act(W_down x + b_down)) + b_up)

=============================================  ============  ============
arrangement                                    place         mode
=============================================  ============  ============
AdaptFormer (Chen et al. 2022), MOS, SEMA      "ffn"         "parallel"
LAE (Gao et al. 2023)                          "attn"        "parallel"
Houlsby et al. 2019 (fig. 2), two per block    "both"        "sequential"
Pfeiffer et al. 2021, one per block            "ffn"         "sequential"
parallel adapter (He et al. 2022, table 1)     "ffn"         "parallel"
=============================================  ============  ============

Behind a branch the adapter sees what the branch puts out, before it is added to the stream: h + F + delta(F), as
Houlsby et al. have it; the order of norms and sums that Pfeiffer et al. chose among many is not followed.
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
from cl_adapters.config import check_range
from cl_adapters.sites.sites import Site


@adapters.register("bottleneck")
@dataclass(frozen=True, kw_only=True)
class Bottleneck(AdapterType):
    """Bottleneck adapter (Chen et al. 2022, AdaptFormer, eq. 3-4; the defaults are those of MOS).

    Attributes:
        bottleneck: width r of the bottleneck.
        place: branch of the feed-forward network ("ffn"), of the attention ("attn"), or an adapter at "both".
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
    place: Literal["ffn", "attn", "both"] = "ffn"
    mode: Literal["parallel", "sequential", "before"] = "parallel"
    scale: float = 0.1
    learn_scale: bool = False
    layer_norm: Literal["none", "in", "out"] = "none"
    activation: Literal["relu", "gelu"] = "relu"
    dropout: float = 0.1
    init_scheme: Literal["zero_up", "normal"] = "zero_up"

    def __post_init__(self) -> None:
        check_range(self, "[1, 65536]", "bottleneck")
        check_range(self, "(-inf, inf)", "scale")
        check_rate(self.dropout)

    @property
    def site_kinds(self) -> tuple[str, ...]:
        """Such as "ffn_parallel" or "attn_sequential"."""
        places = ("attn", "ffn") if self.place == "both" else (self.place,)
        return tuple(f"{place}_{self.mode}" for place in places)

    @property
    def starts_as_identity(self) -> bool:
        """Where W_up starts at zero."""
        return self.init_scheme == "zero_up"

    def shapes(self, site: Site) -> dict[str, tuple[int, ...]]:
        """down [r, D], down_bias [r], up [O, r], up_bias [O]; with options scale [1], norm and norm_bias [D or O]."""
        r, width, out = self.bottleneck, site.width, site.out_width
        shapes: dict[str, tuple[int, ...]] = {"down": (r, width), "down_bias": (r,), "up": (out, r), "up_bias": (out,)}
        if self.learn_scale:
            shapes["scale"] = (1,)
        if self.layer_norm != "none":
            shapes |= dict.fromkeys(("norm", "norm_bias"), (width if self.layer_norm == "in" else out,))
        return shapes

    def init(self, site: Site, generator: torch.Generator) -> dict[str, Tensor]:
        """Fresh tensors; see the attribute ``init_scheme``."""
        params = {name: torch.zeros(shape) for name, shape in self.shapes(site).items()}
        if self.init_scheme == "zero_up":
            params["down"] = kaiming_uniform((self.bottleneck, site.width), generator)
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
        dropout_generator: torch.Generator | None = None,
        y_BNO: Tensor | None = None,
    ) -> Tensor:
        """delta_BNO; one matrix product per projection, also when every sample has its own adapter."""
        if self.layer_norm == "in":
            x_BND = self._norm(x_BND, params)
        hidden_BNR = affine(x_BND, params["down"], params["down_bias"])
        hidden_BNR = F.relu(hidden_BNR) if self.activation == "relu" else F.gelu(hidden_BNR)
        hidden_BNR = dropped(hidden_BNR, self.dropout, dropout_generator)
        # scaling the small matrix is cheaper than scaling the output, and s scales b_up as well
        scale = params["scale"] if self.learn_scale else self.scale
        delta_BNO = affine(hidden_BNR, params["up"] * lifted(scale, 2), params["up_bias"] * lifted(scale, 1))
        return self._norm(delta_BNO, params) if self.layer_norm == "out" else delta_BNO

    def _norm(self, x_BND: Tensor, params: Mapping[str, Tensor]) -> Tensor:
        plain = F.layer_norm(x_BND, x_BND.shape[-1:])
        return plain * params["norm"].unsqueeze(-2) + params["norm_bias"].unsqueeze(-2)


# What the types with matrices share. Every tensor may have one more leading dimension: one adapter per sample.


def affine(x_BNI: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x W^T + b``.

    Args:
        x_BNI: [B, N, I].
        weight: [O, I], or [B, O, I].
        bias: [O], or [B, O].

    Returns:
        [B, N, O].
    """
    if weight.ndim == 2:
        return F.linear(x_BNI, weight, bias)
    if bias is None:
        return torch.bmm(x_BNI, weight.mT)
    return torch.baddbmm(bias.unsqueeze(-2), x_BNI, weight.mT)


def dropped(x: Tensor, rate: float, dropout_generator: torch.Generator | None) -> Tensor:
    """Inverted dropout with the mask drawn from ``dropout_generator``; x as it is where that is None."""
    if dropout_generator is None or not rate:
        return x
    keep = torch.empty_like(x).bernoulli_(1 - rate, generator=dropout_generator)
    return x * keep.div_(1 - rate)


def lifted(scale: float | Tensor, dims: int) -> float | Tensor:
    """A scale, a number or of shape [1] or [B, 1], made to multiply a tensor of ``dims`` own dimensions."""
    if not isinstance(scale, Tensor) or scale.ndim == 1:
        return scale
    return scale.reshape(-1, *([1] * dims))


def kaiming_uniform(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """A fresh matrix [O, I] with PyTorch's bounds for a linear layer, Kaiming-uniform with a = sqrt(5): 1/sqrt(I)."""
    bound = 1 / math.sqrt(shape[1])
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)


def check_rate(dropout: float) -> None:
    """Check a dropout rate.

    Raises:
        ValueError: it is outside [0, 1).
    """
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout must be in [0, 1), got {dropout}")
