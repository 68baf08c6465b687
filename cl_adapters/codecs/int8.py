"""Eight bits per number, with one scale per row of a matrix."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from cl_adapters.codecs.base import Codec, codecs
from cl_adapters.codecs.packing import flat, numbers, part, unflat


@codecs.register("int8")
@dataclass(frozen=True, kw_only=True)
class Int8(Codec):
    """``x ~ s q`` with whole q in [-127, 127] and s = max |x| / 127 per row; every number within s / 2.

    A vector is one row. Of a matrix that is higher than wide, as the second factor of a low-rank adapter, the columns
    are taken, since scales for many short rows would outweigh their numbers.
    """

    summary: ClassVar[str] = "int8 with a float32 scale per row, about 8 bits per number"

    def pack(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """values int8 [n] and scales float32 [rows]."""
        rows = {key: _rows(value) for key, value in tensors.items()}
        scales = {key: _scales(value) for key, value in rows.items()}
        values = {key: _divided(value, scales[key].unsqueeze(1)) for key, value in rows.items()}
        return {"values": flat(values).round().clamp(-127, 127).to(torch.int8), "scales": flat(scales)}

    def unpack(self, packed: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
        """s q."""
        sizes = {key: _row_sizes(shape) for key, shape in shapes.items()}
        heights = {key: (size[0],) for key, size in sizes.items()}
        values = unflat(part(packed, "values", torch.int8, numbers(shapes)).float(), sizes)
        scales = unflat(part(packed, "scales", torch.float32, numbers(heights)), heights)
        return {key: _unrowed(values[key] * scales[key].unsqueeze(1), shape) for key, shape in shapes.items()}


def _divided(rows: Tensor, scales: Tensor) -> Tensor:
    """x / s; 0 where s is, as then all of the row is 0 or too small to have a scale."""
    return torch.where(scales > 0, rows / scales, torch.zeros_like(rows))


def _row_sizes(shape: tuple[int, ...]) -> tuple[int, int]:
    """Number and length of the rows."""
    high, wide = (shape[0], math.prod(shape[1:])) if len(shape) > 1 else (1, math.prod(shape))
    return (wide, high) if high > wide else (high, wide)


def _rows(tensor: Tensor) -> Tensor:
    matrix = tensor.flatten(1) if tensor.ndim > 1 else tensor.reshape(1, -1)
    return matrix.mT if len(matrix) > matrix.shape[1] else matrix


def _unrowed(rows: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The inverse of :func:`_rows`."""
    high = shape[0] if len(shape) > 1 else 1
    return (rows if len(rows) == high else rows.mT).reshape(shape)


def _scales(rows: Tensor) -> Tensor:
    """max |x| / 127 of each row; the largest decoded number, 127 s, has the scale s again, in float32 too."""
    return rows.abs().amax(1) / 127
