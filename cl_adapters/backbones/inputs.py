"""Inputs of a backbone: a tensor with the batch first (texts: token ids), or a mapping of such tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from cl_adapters.errors import DataError

Inputs: TypeAlias = Tensor | Mapping[str, Tensor]


def as_inputs(x: Any) -> Inputs:
    """``x`` with tensors in the place of numpy arrays; tensors are left as they are.

    Raises:
        DataError: something else, an array of no numbers, or nothing to tell the number of samples by.
    """
    if isinstance(x, Mapping):
        if all(isinstance(value, Tensor) for value in x.values()) and x:
            return x
        made: dict[str, Any] = {key: _converted(value, f"{key!r} of the inputs") for key, value in x.items()}
        if not any(isinstance(value, Tensor) for value in made.values()):
            raise DataError(f"a mapping of inputs needs a tensor, got one with {list(x)}")
        return made
    found = _converted(x, "the inputs")
    if not isinstance(found, Tensor):
        raise DataError(f"{_EXPECTED}, got {type(x).__name__}")
    if not found.ndim:
        raise DataError(f"{_EXPECTED}, got a single number")
    return found


_EXPECTED = "inputs are one tensor with the batch first, such as float32 [B, C, H, W] or token ids int64 [B, N]"


def _converted(value: Any, what: str) -> Any:
    if isinstance(value, list | tuple):
        raise DataError(
            f"{what} came as a {type(value).__name__}: put it into one tensor with the batch first (torch.stack, or "
            "return_tensors='pt' of a tokenizer)"
        )
    if not isinstance(value, np.ndarray):
        return value
    try:
        # a copy: arrays may be read-only, reversed or of another byte order
        return torch.from_numpy(np.array(value, value.dtype.newbyteorder("="), order="C"))
    except (TypeError, ValueError) as error:
        raise DataError(f"{what} came as an array of {value.dtype}, which is no type of numbers here") from error


def check_finite(x: Tensor, name: str) -> None:
    """Check that all numbers are finite: NaN would run through backbone ``name`` and come out as an answer.

    Raises:
        DataError: says how many inputs have others, and where they stand.
    """
    if not x.is_floating_point() or bool(x.detach().sum().isfinite()):  # one pass over the memory
        return
    wrong = (~x.isfinite().reshape(len(x), -1).all(1)).nonzero().flatten().tolist()
    if wrong:  # else the sum was too large
        shown = ", ".join(map(str, wrong[:10])) + (", ..." if len(wrong) > 10 else "")
        raise DataError(
            f"{len(wrong)} of {len(x)} inputs of backbone {name!r} have numbers that are not finite (NaN or "
            f"infinite), at positions {shown} of the batch: leave them out, or mend how they are read and normalised"
        )


def batch_size(x: Inputs) -> int:
    """Number of samples B in ``x``."""
    first = x if isinstance(x, Tensor) else next(value for value in x.values() if isinstance(value, Tensor))
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
