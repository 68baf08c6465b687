"""TIES: trim, elect signs, and average what agrees."""

from __future__ import annotations

from torch import Tensor

from cl_adapters.merge.base import deltas, merges, on_base, trimmed


@merges.register("ties")
def ties(tensors: list[Tensor], base: Tensor | None = None, density: float = 0.2, scale: float = 1.0) -> Tensor:
    """``base + scale * mean`` of the trimmed changes whose sign is the elected one, number by number.

    The sign of the larger total mass is elected. Where both masses are equal none is, and the change is 0: so the
    result does not depend on the order, and changes sign with its inputs. Source: Yadav et al. 2023, algorithm 1
    (density and scale: its recipe without validation data); here each tensor is trimmed on its own.

    Args:
        tensors: of one shape.
        base: what they were trained from; None: 0, the tensors are changes already.
        density: share of each change that survives the trimming, in (0, 1].
        scale: lambda.

    Raises:
        ConfigError: density out of range.
    """
    stacked = trimmed(deltas(tensors, base), density)
    elected = stacked.sum(0).sign()
    agree = (stacked.sign() == elected) & (stacked != 0)
    mean = (stacked * agree).sum(0) / agree.sum(0).clamp_min(1)
    return on_base(scale * mean, base)
