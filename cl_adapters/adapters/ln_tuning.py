"""LayerNorm tuning: scale and shift of what the norms of a block put out.

y' = (1 + g) * y + b

On n * gamma + beta, a LayerNorm with its own weights, that is every LayerNorm with weights (1 + g) gamma and
(1 + g) beta + b: the tuning of LayerNorms (Basu et al. 2024), and SSF (Lian et al. 2022) at the norms alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from cl_adapters.adapters.base import AdapterType, adapters
from cl_adapters.sites.sites import Site


@adapters.register("ln_tuning")
@dataclass(frozen=True, kw_only=True)
class LNTuning(AdapterType):
    """Scale and shift of the normalised activations; two numbers per channel and norm.

    Attributes:
        place: the norm of the attention ("attn"), of the feed-forward network ("ffn"), or "both". It lies before its
            branch in most backbones, behind it in BERT and its like; RMS norms are taken as well.
    """

    summary: ClassVar[str] = "scale and shift of what the norms put out (LayerNorm tuning, SSF)"

    aligned: ClassVar[bool] = True

    place: Literal["both", "attn", "ffn"] = "both"

    @property
    def site_kinds(self) -> tuple[str, ...]:
        """The kinds "attn_norm", "ffn_norm" or both."""
        return ("attn_norm", "ffn_norm") if self.place == "both" else (f"{self.place}_norm",)

    def shapes(self, site: Site) -> dict[str, tuple[int, ...]]:
        """scale g and shift b, each [O]."""
        return {"scale": (site.out_width,), "shift": (site.out_width,)}

    def init(self, site: Site, generator: torch.Generator) -> dict[str, Tensor]:
        """Zeros: the identity."""
        return {name: torch.zeros(shape) for name, shape in self.shapes(site).items()}

    def apply(
        self,
        x_BND: Tensor,
        params: Mapping[str, Tensor],
        dropout_generator: torch.Generator | None = None,
        y_BNO: Tensor | None = None,
    ) -> Tensor:
        """delta_BNO = g x + b."""
        return torch.addcmul(params["shift"].unsqueeze(-2), params["scale"].unsqueeze(-2), x_BND)
