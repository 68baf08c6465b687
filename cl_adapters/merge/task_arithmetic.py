"""Task arithmetic: add up what the tasks have changed."""

from __future__ import annotations

from torch import Tensor

from cl_adapters.merge.base import deltas, linear, merges, on_base


@merges.register("task_arithmetic")
@linear
def task_arithmetic(tensors: list[Tensor], base: Tensor | None = None, scale: float = 0.4) -> Tensor:
    """``base + scale * sum_t (w_t - base)``. Source: Ilharco et al. 2023, section 2.

    Args:
        tensors: w_t, of one shape.
        base: what they were trained from; None: 0, the tensors are changes already.
        scale: lambda; 0.4 is the value for use without validation data (Yadav et al. 2023), negative unlearns.
    """
    return on_base(scale * deltas(tensors, base).sum(0), base)
