"""Two adapter types side by side as one adapter, such as LoRA and LayerNorm tuning trained together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from cl_adapters.adapters.base import AdapterField, AdapterType, adapters
from cl_adapters.adapters.ln_tuning import LNTuning
from cl_adapters.adapters.lora import LoRA
from cl_adapters.errors import ClAdaptersError, ConfigError
from cl_adapters.sites.sites import Site


@adapters.register("pair")
@dataclass(frozen=True, kw_only=True)
class Pair(AdapterType):
    """Both types at once: one slot of a bank holds, trains and saves the tensors of both.

    At every site one of them is at work, so they need different kinds of sites; a third goes into a pair in a pair.

    Attributes:
        first: an adapter type with its options.
        second: the other.
    """

    summary: ClassVar[str] = "two adapter types side by side as one; LoRA and LayerNorm tuning unless told otherwise"

    first: AdapterField = field(default_factory=LoRA)
    second: AdapterField = field(default_factory=LNTuning)

    def __post_init__(self) -> None:
        twice = [kind for kind in self.first.site_kinds if kind in self.second.site_kinds]
        if twice:
            raise ConfigError(
                f"first and second of a pair must attach at different kinds of sites, got {twice[0]} twice"
            )

    @property
    def site_kinds(self) -> tuple[str, ...]:
        """Those of the first, then those of the second."""
        return (*self.first.site_kinds, *self.second.site_kinds)

    @property
    def starts_as_identity(self) -> bool:
        """Where both do."""
        return self.first.starts_as_identity and self.second.starts_as_identity

    def at(self, site: Site) -> AdapterType:
        """The one of the two that attaches there."""
        return (self.first if site.kind in self.first.site_kinds else self.second).at(site)

    def shapes(self, site: Site) -> dict[str, tuple[int, ...]]:
        """Those of the type at this site."""
        return self.at(site).shapes(site)

    def init(self, site: Site, generator: torch.Generator) -> dict[str, Tensor]:
        """Those of the type at this site."""
        return self.at(site).init(site, generator)

    def apply(
        self,
        x_BND: Tensor,
        params: Mapping[str, Tensor],
        dropout_generator: torch.Generator | None = None,
        y_BNO: Tensor | None = None,
    ) -> Tensor:
        """Nothing: which of the two is meant depends on the site.

        Raises:
            ClAdaptersError: always.
        """
        raise ClAdaptersError("a pair is applied by the type at a site: pair.at(site).apply(...)")
