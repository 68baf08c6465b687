"""Magnitude pruning: average the largest changes."""

from __future__ import annotations

from torch import Tensor

from cl_adapters.merge.base import deltas, merges, on_base, trimmed


@merges.register("magnitude")
def magnitude(tensors: list[Tensor], base: Tensor | None = None, density: float = 0.5) -> Tensor:
    """``base + mean_t prune(w_t - base)``, where pruning sets all but the largest magnitudes to 0.

    Unlike in TIES, a number that most tensors have pruned is averaged with their zeros. Source: Han et al. 2015,
    applied to the change instead of the weights.

    Args:
        tensors: w_t, of one shape.
        base: what they were trained from; None: 0, the tensors are changes already.
        density: kept share of each change, in (0, 1].

    Raises:
        ConfigError: density out of range.
    """
    return on_base(trimmed(deltas(tensors, base), density).mean(0), base)
