"""What a merge method is: ``(tensors, **params) -> tensor`` without side effects; its signature is its schema.

The tensors are of one shape, and so is the new one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias, TypeVar

import torch
from torch import Tensor

from cl_adapters.errors import ClAdaptersError, ConfigError
from cl_adapters.registry import Registry

MergeMethod: TypeAlias = Callable[..., Tensor]
"""``(tensors: list[Tensor], **params) -> Tensor``; the parameters differ, so the type says no more."""

merges: Registry[MergeMethod] = Registry("merge method", "cl_adapters.merge", group="cl_adapters.merge")

M = TypeVar("M", bound=MergeMethod)
_linear: set[MergeMethod] = set()


def linear(method: M) -> M:
    """Decorator: the result is a sum of the inputs times numbers that do not depend on them.

    Low-rank adapters are then merged from their factors alone, without forming a matrix
    (:mod:`cl_adapters.merge.adapters`); a method without this mark is given the matrices.
    """
    _linear.add(method)
    return method


def is_linear(method: MergeMethod) -> bool:
    """Whether the method carries the mark of :func:`linear`."""
    return method in _linear


# What the methods share.


def deltas(tensors: list[Tensor], base: Tensor | None) -> Tensor:
    """What each tensor adds to the base: one stack [T, ...]; without a base the tensors themselves.

    Raises:
        ClAdaptersError: no tensors, or not all of one shape.
    """
    shapes = [tuple(tensor.shape) for tensor in [*tensors, *([] if base is None else [base])]]
    if not tensors or len(set(shapes)) > 1:
        raise ClAdaptersError(f"merging needs tensors (and a base) of one shape and at least one of them, got {shapes}")
    stacked = torch.stack(tensors)
    return stacked if base is None else stacked - base


def on_base(delta: Tensor, base: Tensor | None) -> Tensor:
    """``base + delta``; without a base delta alone."""
    return delta if base is None else base + delta


def trimmed(stacked: Tensor, density: float) -> Tensor:
    """Keep the largest magnitudes of each of T tensors and set the rest to 0.

    Args:
        stacked: [T, ...].
        density: kept share of each tensor, in (0, 1]; at least one number is kept.

    Returns:
        A new tensor [T, ...].

    Raises:
        ConfigError: density out of range.
    """
    if not 0 < density <= 1:
        raise ConfigError(f"density must be in (0, 1], got {density}")
    flat = stacked.reshape(len(stacked), -1)
    kept = flat.abs().topk(max(1, round(density * flat.shape[1])), dim=1).indices
    return torch.zeros_like(flat).scatter(1, kept, flat.gather(1, kept)).reshape(stacked.shape)
