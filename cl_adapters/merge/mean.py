"""The plain mean."""

from __future__ import annotations

import torch
from torch import Tensor

from cl_adapters.merge.base import linear, merges


@merges.register("mean")
@linear
def mean(tensors: list[Tensor]) -> Tensor:
    """Mean of tensors of one shape; mu_t of MOS is the mean of the adapters of all finished tasks."""
    return torch.stack(tensors).mean(0)
