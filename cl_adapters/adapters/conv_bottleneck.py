"""The bottleneck adapter for feature maps: convolutions instead of matrices.

delta(x) = s * (W_up * drop(act(W_down * x + b_down)) + b_up)

with 1 x 1 convolutions; with ``kernel`` > 1 another convolution lies in the bottleneck and sees the neighbours.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from cl_adapters.adapters.base import AdapterType, adapters
from cl_adapters.adapters.bottleneck import check_rate, dropped, kaiming_uniform, lifted
from cl_adapters.config import check_range
from cl_adapters.sites.sites import Layout, Site


@adapters.register("conv_bottleneck")
@dataclass(frozen=True, kw_only=True)
class ConvBottleneck(AdapterType):
    """Convolutional bottleneck parallel to a whole block, for backbones whose tokens lie on a grid.

    The defaults are those of LAE on ConvNeXt (Gao et al. 2023): bottleneck 5, GELU, a learned scale that starts at 1.
    With ``kernel`` 3 it is Convpass (Jie & Deng 2022, released convpass.py: one full convolution over all r channels
    that starts as the identity, activations on both sides of it), but for the place and Convpass's own GELU.

    Attributes:
        bottleneck: width r of the bottleneck.
        kernel: side of the convolution in the bottleneck, odd; 1: there is none.
        scale: s; also scales b_up.
        learn_scale: s is a trained number that starts at ``scale``.
        activation: "relu" or "gelu".
        dropout: rate on the bottleneck while training.
    """

    summary: ClassVar[str] = "bottleneck of 1 x 1 convolutions parallel to a block, for feature maps"
    layout: ClassVar[Layout] = "map"

    bottleneck: int = 5
    kernel: int = 1
    scale: float = 1.0
    learn_scale: bool = True
    activation: Literal["relu", "gelu"] = "gelu"
    dropout: float = 0.0

    def __post_init__(self) -> None:
        check_range(self, "[1, 65536]", "bottleneck")
        check_range(self, "[1, 255]", "kernel")
        check_range(self, "(-inf, inf)", "scale")
        if self.kernel % 2 == 0:
            raise ValueError(f"kernel must be odd, so that the map keeps its size, got {self.kernel}")
        check_rate(self.dropout)

    @property
    def site_kinds(self) -> tuple[str, ...]:
        """Parallel to the whole block."""
        return ("block_parallel",)

    def shapes(self, site: Site) -> dict[str, tuple[int, ...]]:
        """down [r, D], down_bias [r], up [O, r], up_bias [O]; conv [r, r, k, k], conv_bias [r], scale [1] as asked."""
        r, k = self.bottleneck, self.kernel
        shapes: dict[str, tuple[int, ...]] = {"down": (r, site.width), "down_bias": (r,)}
        if k > 1:
            shapes |= {"conv": (r, r, k, k), "conv_bias": (r,)}
        shapes |= {"up": (site.out_width, r), "up_bias": (site.out_width,)}
        return shapes | {"scale": (1,)} if self.learn_scale else shapes

    def init(self, site: Site, generator: torch.Generator) -> dict[str, Tensor]:
        """W_down Kaiming-uniform with a = sqrt 5, the inner convolution the identity, all else 0."""
        params = {name: torch.zeros(shape) for name, shape in self.shapes(site).items()}
        params["down"] = kaiming_uniform((self.bottleneck, site.width), generator)
        if "conv" in params:
            params["conv"][:, :, self.kernel // 2, self.kernel // 2] = torch.eye(self.bottleneck)
        if "scale" in params:
            params["scale"].fill_(self.scale)
        return params

    def apply(
        self,
        x_BND: Tensor,
        params: Mapping[str, Tensor],
        dropout_generator: torch.Generator | None = None,
        y_BNO: Tensor | None = None,
    ) -> Tensor:
        """delta [B, O, H, W] from x [B, D, H, W]."""
        act = F.relu if self.activation == "relu" else F.gelu
        hidden = act(_pointwise(x_BND, params["down"], params["down_bias"]))
        if self.kernel > 1:
            hidden = act(_convolved(hidden, params["conv"], params["conv_bias"]))
        hidden = dropped(hidden, self.dropout, dropout_generator)
        scale = params["scale"] if self.learn_scale else self.scale
        return _pointwise(hidden, params["up"] * lifted(scale, 2), params["up_bias"] * lifted(scale, 1))


def _pointwise(x_BIHW: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """1 x 1 convolution with weight [O, I], or [B, O, I] for one weight per sample."""
    y_BOM = weight @ x_BIHW.flatten(2) + bias.unsqueeze(-1)
    return y_BOM.reshape(*y_BOM.shape[:2], *x_BIHW.shape[2:])


def _convolved(x_BRHW: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """k x k convolution that keeps the size, weight [R, R, k, k] or [B, R, R, k, k]: then one group per sample."""
    padding = weight.shape[-1] // 2
    if weight.ndim == 4:
        return F.conv2d(x_BRHW, weight, bias, padding=padding)
    batch = len(x_BRHW)
    together = F.conv2d(x_BRHW.flatten(0, 1), weight.flatten(0, 1), bias.flatten(), padding=padding, groups=batch)
    return together.reshape(batch, -1, *together.shape[1:])
