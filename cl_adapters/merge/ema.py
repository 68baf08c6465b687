"""Exponential moving average towards an anchor: the adapter merging of MOS."""

from __future__ import annotations

from torch import Tensor

from cl_adapters.errors import ConfigError
from cl_adapters.merge.base import linear, merges


@merges.register("ema")
@linear
def ema(tensors: list[Tensor], momentum: float = 0.1, steps: int = 1) -> Tensor:
    """Apply ``w <- (1 - m) w + m anchor`` ``steps`` times, in closed form.

    After n steps ``w = anchor + (1 - m)^n (w - anchor)``. Source: MOS (Sun et al. 2025), adapter merging.

    Args:
        tensors: [w, anchor], of one shape.
        momentum: m, the share of the anchor in one step; in [0, 1].
        steps: n.

    Raises:
        ConfigError: not two tensors, or momentum or steps out of range.
    """
    if len(tensors) != 2:
        raise ConfigError(f"it takes two, an adapter and its anchor, got {len(tensors)}")
    if not 0 <= momentum <= 1 or steps < 0:
        raise ConfigError(f"momentum must be in [0, 1] and steps at least 0, got {momentum} and {steps}")
    weight, anchor = tensors
    return anchor + (1 - momentum) ** steps * (weight - anchor)
