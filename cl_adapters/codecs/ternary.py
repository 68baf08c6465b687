"""Sparse ternary: the signs of the largest numbers, one scale, zeros elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import ClassVar

import torch
from torch import Tensor

from cl_adapters.codecs.base import Codec, codecs
from cl_adapters.codecs.packing import (
    flat,
    matrices,
    num_bytes,
    numbers,
    pack_bits,
    pack_positions,
    part,
    shapes_of,
    to_half,
    unflat,
    unpack_bits,
    unpack_positions,
    vectors,
)
from cl_adapters.errors import StorageError


@codecs.register("ternary")
@dataclass(frozen=True, kw_only=True)
class Ternary(Codec):
    """``x ~ s t`` with t in {-1, 0, 1}: the sign of the largest magnitudes of each matrix (Yadav et al. 2023, ComPEFT).

    ComPEFT prunes the whole change at once and takes s = alpha * its standard deviation, alpha by validation. Here each
    matrix has its own share and scale, since the matrices of an adapter differ in size by orders of magnitude and a
    common threshold would erase the smaller ones; and without ``alpha`` the scale is the nearest one, the mean of what
    is kept: ||x - s t||^2 = ||x||^2 - k s^2. Positions are Elias-Fano coded instead of Golomb. Vectors are stored as
    float16.

    Attributes:
        density: kept share of each matrix, in (0, 1]; at least one number is kept.
        alpha: scale in standard deviations of the matrix; None: the mean of the kept magnitudes.
    """

    summary: ClassVar[str] = "signs of the largest numbers and a scale per matrix, about 0.6 bits per number at 0.1"

    density: float = 0.1
    alpha: float | None = None

    def __post_init__(self) -> None:
        if not 0 < self.density <= 1:
            raise ValueError(f"density must be in (0, 1], got {self.density}")
        if self.alpha is not None and not 0 < self.alpha < float("inf"):
            raise ValueError(f"alpha must be positive, got {self.alpha}")

    def pack(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Elias-Fano low and high uint8, signs uint8, count int64 [1], scales float32, vectors float16."""
        shapes = shapes_of(tensors)
        kept, scales = {}, {}
        for key in matrices(shapes):
            values = tensors[key].flatten()
            kept[key] = _largest(values, self.density)
            scales[key] = self._scale(values, kept[key])
        numbers_kept = flat({key: tensors[key].flatten() * mask for key, mask in kept.items()})
        positions = numbers_kept.nonzero().flatten()
        return {
            **pack_positions(positions, len(numbers_kept)),
            "signs": pack_bits(numbers_kept[positions] > 0),
            "count": torch.tensor([len(positions)]),
            "scales": flat(scales),
            "vectors": to_half({key: tensors[key] for key in vectors(shapes)}),
        }

    def unpack(self, packed: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
        """s t."""
        large, small = matrices(shapes), vectors(shapes)
        total, count = numbers(large), int(part(packed, "count", torch.int64, 1))
        if not 0 <= count <= total:
            raise StorageError(f"the encoded adapter is damaged: {count} of {total} numbers kept")
        positions = unpack_positions(packed, count, total)
        positive = unpack_bits(part(packed, "signs", torch.uint8, num_bytes(count)), count)
        scales = part(packed, "scales", torch.float32, len(large))
        values = torch.zeros(total)
        if count:
            ends = torch.tensor(list(accumulate(numbers({key: shape}) for key, shape in large.items())))
            scale = scales[torch.searchsorted(ends, positions, right=True)]
            values[positions] = torch.where(positive, scale, -scale)
        found = unflat(values, large) | unflat(part(packed, "vectors", torch.float16, numbers(small)).float(), small)
        return {key: found[key] for key in shapes}

    def _scale(self, values: Tensor, kept: Tensor) -> Tensor:
        """One number, [1]."""
        if self.alpha is not None:
            return (self.alpha * values.std(correction=0)).reshape(1)
        # in float64 the mean of n equal float32 is that number: coding twice changes nothing
        return (values.double().abs() * kept).sum().div(kept.sum().clamp_min(1)).float().reshape(1)


def _largest(values: Tensor, density: float) -> Tensor:
    """Mask of the largest magnitudes of a vector, without zeros; of equal ones the first."""
    count = max(1, round(density * len(values)))
    order = values.abs().argsort(descending=True, stable=True)
    mask = torch.zeros(len(values), dtype=torch.bool)
    mask[order[:count]] = True
    return mask & (values != 0)
