"""Inputs of a backbone: a tensor with the batch first (texts: token ids), or a mapping of such tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeAlias

import torch
from torch import Tensor

Inputs: TypeAlias = Tensor | Mapping[str, Tensor]


def batch_size(x: Inputs) -> int:
    """Number of samples B in ``x``."""
    first = x if isinstance(x, Tensor) else next(iter(x.values()))
    return int(first.shape[0])


def take(x: Inputs, rows: Tensor) -> Inputs:
    """The samples ``rows`` (int64 [M]) of ``x``, in that order."""
    if isinstance(x, Tensor):
        return x.index_select(0, rows.to(x.device))
    return {key: value.index_select(0, rows.to(value.device)) for key, value in x.items()}


def to_device(x: Inputs, device: torch.device) -> Inputs:
    """``x`` on ``device``."""
    if isinstance(x, Tensor):
        return x.to(device)
    return {key: value.to(device) for key, value in x.items()}
