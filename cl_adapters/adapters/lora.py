"""LoRA: a low-rank update of linear projections, as an added output.

y = W x + s * B (A x),   that is dW = s B A

where W stands for a linear layer of a block: a projection of the attention, or a layer of the feed-forward network.
A fused qkv projection has one site per third, so that what is not a target gets exactly nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from cl_adapters.adapters.base import AdapterType, adapters
from cl_adapters.adapters.bottleneck import affine, check_rate, dropped, kaiming_uniform, lifted
from cl_adapters.config import OMITTED_AT_DEFAULT, check_range
from cl_adapters.errors import ConfigError
from cl_adapters.sites.sites import Site

Target = Literal["query", "key", "value", "output", "up", "gate", "down"]
"""Linear layers of a block: of the attention its three projections and that of its output, of the feed-forward network
the way up, the gate beside it where there is one, and the way down."""


@adapters.register("lora")
@dataclass(frozen=True, kw_only=True)
class LoRA(AdapterType):
    """Low-rank adaptation (Hu et al. 2022, eq. 3) of linear layers.

    LAE's form (Gao et al. 2023; released pet/lora.py) is ``learn_scale=True``: rank 5 on key and value, each with a
    learned number s that starts at 1.

    Attributes:
        rank: r.
        targets: the adapted layers; a backbone without one of them is refused, with what it has.
        scale: s; PEFT calls it alpha / r.
        learn_scale: s is a trained number per projection that starts at ``scale``.
        dropout: rate on the projection's input while training, on the way to A only.
        init_scheme: "kaiming" (A Kaiming-uniform with a = sqrt 5, B 0: the identity at the start, as in LAE and PEFT),
            "gaussian" (A ~ N(0, 1 / r^2), B 0; PEFT's "gaussian"), or "random" (both Kaiming-uniform, no identity;
            PEFT's False).
    """

    summary: ClassVar[str] = "low-rank update of the attention's projections or the feed-forward network's layers"

    rank: int = 5
    targets: tuple[Target, ...] = ("key", "value")
    scale: float = 1.0
    learn_scale: bool = False
    dropout: float = 0.0
    init_scheme: Literal["kaiming", "gaussian", "random"] = field(default="kaiming", metadata=OMITTED_AT_DEFAULT)

    def __post_init__(self) -> None:
        check_range(self, "[1, 65536]", "rank")
        check_range(self, "(-inf, inf)", "scale")
        if not self.targets or len(set(self.targets)) < len(self.targets):
            raise ValueError(f"targets must name each projection once and at least one, got {list(self.targets)}")
        check_rate(self.dropout)

    @property
    def site_kinds(self) -> tuple[str, ...]:
        """The targets: one site per projection."""
        return self.targets

    @property
    def starts_as_identity(self) -> bool:
        """Where B starts at zero."""
        return self.init_scheme != "random"

    def shapes(self, site: Site) -> dict[str, tuple[int, ...]]:
        """A [r, D] and B [O, r]; with ``learn_scale`` scale [1]."""
        shapes: dict[str, tuple[int, ...]] = {"A": (self.rank, site.width), "B": (site.out_width, self.rank)}
        return shapes | {"scale": (1,)} if self.learn_scale else shapes

    def init(self, site: Site, generator: torch.Generator) -> dict[str, Tensor]:
        """Fresh tensors; see the attribute ``init_scheme``."""
        params = {name: torch.zeros(shape) for name, shape in self.shapes(site).items()}
        if self.init_scheme == "gaussian":
            params["A"].normal_(0, 1 / self.rank, generator=generator)
        else:
            params["A"] = kaiming_uniform((self.rank, site.width), generator)
        if self.init_scheme == "random":
            params["B"] = kaiming_uniform((site.out_width, self.rank), generator)
        if self.learn_scale:
            params["scale"].fill_(self.scale)
        return params

    def apply(
        self,
        x_BND: Tensor,
        params: Mapping[str, Tensor],
        dropout_generator: torch.Generator | None = None,
        y_BNO: Tensor | None = None,
    ) -> Tensor:
        """delta_BNO = s B (A x)."""
        scale = params["scale"] if self.learn_scale else self.scale
        hidden_BNR = affine(dropped(x_BND, self.dropout, dropout_generator), params["A"])
        return affine(hidden_BNR, params["B"] * lifted(scale, 2))

    def delta_factors(self, params: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """A and s B."""
        return params["A"], params["B"] * (params["scale"] if self.learn_scale else self.scale)

    def from_factors(self, a_RD: Tensor, b_OR: Tensor) -> tuple[LoRA, dict[str, Tensor]]:
        """LoRA of that rank; a learned scale is 1, another is divided out of B.

        Raises:
            ConfigError: the type's scale is 0, which no B can undo.
        """
        if self.learn_scale:
            params = {"A": a_RD, "B": b_OR, "scale": a_RD.new_ones(1)}
        elif self.scale:
            params = {"A": a_RD, "B": b_OR / self.scale}
        else:
            raise ConfigError("LoRA with scale 0 adds nothing, whatever its tensors are; give it another scale")
        return replace(self, rank=len(a_RD)), params
