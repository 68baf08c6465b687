"""DARE: drop most of each change at random and rescale the rest."""

from __future__ import annotations

import torch
from torch import Tensor

from cl_adapters._seeding import generator
from cl_adapters.errors import ConfigError
from cl_adapters.merge.base import deltas, merges, on_base


@merges.register("dare")
def dare(
    tensors: list[Tensor], base: Tensor | None = None, drop: float = 0.5, scale: float | None = None, seed: int = 0
) -> Tensor:
    """``base + scale * sum_t m_t (w_t - base) / (1 - drop)``, each number of m_t being 0 with probability ``drop``.

    In expectation it is task arithmetic, or for the default scale the mean. Source: Yu et al. 2024, section 3.2.

    Args:
        tensors: w_t, of one shape.
        base: what they were trained from; None: 0, the tensors are changes already.
        drop: p, the dropped share, in [0, 1).
        scale: lambda; None: 1 / T.
        seed: of the masks; the same seed drops the same numbers.

    Raises:
        ConfigError: drop out of range.
    """
    if not 0 <= drop < 1:
        raise ConfigError(f"drop must be in [0, 1), got {drop}")
    stacked = deltas(tensors, base)
    draws = torch.rand(stacked.shape, generator=generator(seed, "dare"), dtype=torch.float32)
    kept = (draws >= drop).to(stacked)
    merged = (stacked * kept).sum(0) * ((1 / len(tensors) if scale is None else scale) / (1 - drop))
    return on_base(merged, base)
