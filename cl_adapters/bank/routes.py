"""Routes: who uses which adapter in one forward pass. Plain values; making one changes nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

BARE = -1
"""Slot number that stands for the backbone without any adapter."""


@dataclass(frozen=True)
class Route:
    """Who uses which adapter in one forward pass.

    Attributes:
        slots: the distinct slots in use, U of them.
        index_B: int64 [B], position in ``slots`` per sample; None when one slot serves all.
        weights_BU: float [B, U], soft mixture of the slots' outputs; None when the choice is hard.
        router: computes ``weights_BU`` from the site's own input x_BND, during the pass.
    """

    slots: tuple[int, ...]
    index_B: Tensor | None = None
    weights_BU: Tensor | None = None
    router: Callable[[Tensor], Tensor] | None = None

    @classmethod
    def single(cls, slot: int) -> Route:
        """The same slot for every sample."""
        return cls((slot,))

    @classmethod
    def hard(cls, ids_B: Tensor) -> Route:
        """One slot per sample, int64 [B]."""
        slots, index_B = torch.unique(ids_B, return_inverse=True)
        return cls(tuple(slots.tolist()), None if len(slots) == 1 else index_B)

    @classmethod
    def soft(cls, weights_BT: Tensor) -> Route:
        """A weighted sum of all slots' outputs per sample, float [B, T]; slots of weight 0 everywhere are skipped."""
        slots = (weights_BT != 0).any(0).nonzero().flatten()
        return cls(tuple(slots.tolist()), weights_BU=weights_BT[:, slots])

    @classmethod
    def mixed(cls, slots: tuple[int, ...], router: Callable[[Tensor], Tensor]) -> Route:
        """A weighted sum of these slots' outputs; ``router`` maps the site's input [B, N, D] to weights [B, U]."""
        return cls(slots, router=router)


Routes: TypeAlias = Route | Mapping[str, Route]
"""One route for all sites, or one per site name (sites that are not named stay bare)."""
