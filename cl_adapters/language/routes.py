"""Routes of batches of texts that are cut, repeated or put into another order on their way."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from cl_adapters.bank.routes import Route, Routes
from cl_adapters.errors import ClAdaptersError


def taken(routes: Routes | None, rows_M: Tensor) -> Routes | None:
    """The routes of these rows.

    Args:
        routes: of B rows, or the same for all.
        rows_M: int64 [M], in [0, B); may repeat.
    """
    return _each(routes, lambda route: _taken(route, rows_M))


def summed(slots: Sequence[int], rows: int, device: torch.device | str = "cpu") -> Route:
    """Every row uses all these adapters, their outputs added (each with weight 1)."""
    return Route(tuple(slots), weights_BU=torch.ones(rows, len(slots), device=device))


def check_rows(routes: Routes | None, rows: int) -> None:
    """Check that routes are made for a batch of that size.

    Raises:
        ClAdaptersError: they are for another one.
    """
    for route in _singles(routes):
        for choices in (route.index_B, route.weights_BU):
            if choices is not None and len(choices) != rows:
                raise ClAdaptersError(f"the route has {len(choices)} samples, but there are {rows} prompts")


def has_router(routes: Routes | None) -> bool:
    """Whether a route is computed from the text during the pass."""
    return any(route.router is not None for route in _singles(routes))


def _singles(routes: Routes | None) -> Sequence[Route]:
    if routes is None:
        return ()
    return tuple(routes.values()) if isinstance(routes, Mapping) else (routes,)


def _each(routes: Routes | None, change: Callable[[Route], Route]) -> Routes | None:
    if routes is None:
        return None
    if isinstance(routes, Mapping):
        return {site: change(route) for site, route in routes.items()}
    return change(routes)


def _taken(route: Route, rows_M: Tensor) -> Route:
    index_B, weights_BU = route.index_B, route.weights_BU
    return replace(
        route,
        index_B=None if index_B is None else index_B[rows_M.to(index_B.device)],
        weights_BU=None if weights_BU is None else weights_BU[rows_M.to(weights_BU.device)],
    )
