"""Metrics-weighted averaging: the better ones count more."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cl_adapters.errors import ConfigError
from cl_adapters.merge.base import deltas, linear, merges


@merges.register("weighted")
@linear
def weighted(tensors: list[Tensor], metrics: Sequence[float] | None = None, temperature: float | None = None) -> Tensor:
    """``sum_t a_t w_t`` with sum_t a_t = 1, the a_t from one metric of each.

    The idea is that of metrics-weighted averaging (Yu & Choi 2025), who weight checkpoints by training loss or steps.

    Args:
        tensors: w_t, of one shape.
        metrics: one number per tensor, higher is better (of a loss give the negative, with a temperature); None: all
            equal.
        temperature: a = softmax(metrics / temperature); None: a = metrics / sum(metrics), for metrics that are at
            least 0.

    Raises:
        ConfigError: metrics or temperature that give no weights.
    """
    stacked = deltas(tensors, None)
    weights = _weights([1.0] * len(tensors) if metrics is None else list(metrics), len(tensors), temperature)
    return torch.einsum("t,t...->...", weights.to(stacked), stacked)


def _weights(metrics: list[float], count: int, temperature: float | None) -> Tensor:
    values = torch.tensor(metrics, dtype=torch.float64)
    if len(values) != count or not values.isfinite().all():
        raise ConfigError(f"metrics must be {count} finite numbers, one per adapter, got {metrics}")
    if temperature is not None:
        if not temperature > 0:
            raise ConfigError(f"temperature must be positive, got {temperature}")
        return (values / temperature).softmax(0)
    if (values < 0).any() or not values.any():
        raise ConfigError(
            f"metrics must be at least 0 and not all 0, got {metrics}; for others (a negative loss) give a temperature"
        )
    return values / values.sum()
