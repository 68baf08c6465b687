"""Routes: who uses which adapter in one forward pass. Plain values; making one changes nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch
from torch import Tensor

from cl_adapters.errors import ClAdaptersError

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


def taken(routes: Routes | None, rows_M: Tensor) -> Routes | None:
    """The routes of these rows, int64 [M] in [0, B); they may repeat."""
    if isinstance(routes, Mapping):
        return {site: _taken(route, rows_M) for site, route in routes.items()}
    return None if routes is None else _taken(routes, rows_M)


def summed(slots: Sequence[int], rows: int, device: torch.device | str = "cpu") -> Route:
    """Every row uses all these adapters, their outputs added (each with weight 1)."""
    return Route(tuple(slots), weights_BU=torch.ones(rows, len(slots), device=device))


def check_prompts(routes: Routes | None, prompts: int) -> None:
    """Check that routes are made for a batch of so many prompts.

    Raises:
        ClAdaptersError: they are for another one.
    """
    for route in each_route(routes):
        for choices in (route.index_B, route.weights_BU):
            if choices is not None and len(choices) != prompts:
                raise ClAdaptersError(f"the route has {len(choices)} samples, but there are {prompts} prompts")


def has_router(routes: Routes | None) -> bool:
    """Whether a route is computed from the text during the pass."""
    return any(route.router is not None for route in each_route(routes))


def each_route(routes: Routes | None) -> Sequence[Route]:
    """The single routes."""
    if routes is None:
        return ()
    return tuple(routes.values()) if isinstance(routes, Mapping) else (routes,)


def _taken(route: Route, rows_M: Tensor) -> Route:
    index_B, weights_BU = route.index_B, route.weights_BU
    return replace(
        route,
        index_B=None if index_B is None else index_B[rows_M.to(index_B.device)],
        weights_BU=None if weights_BU is None else weights_BU[rows_M.to(weights_BU.device)],
    )
