"""One bit per number: its sign, with a scale."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from cl_adapters.codecs.base import Codec, codecs
from cl_adapters.codecs.packing import (
    flat,
    matrices,
    num_bytes,
    numbers,
    pack_bits,
    part,
    shapes_of,
    to_half,
    unflat,
    unpack_bits,
    vectors,
)


@codecs.register("onebit")
@dataclass(frozen=True, kw_only=True)
class OneBit(Codec):
    """``x ~ s sign(x)`` with s = mean |x|, the nearest such matrix: ||x - s sign(x)||^2 = ||x||^2 - n s^2.

    Adapters tolerate it, as their loss is flat in their weights (Jie et al. 2023, Revisiting the Parameter Efficiency
    of Adapters from the Perspective of Precision Redundancy). That work trains with quantised weights; here trained
    ones are quantised, and the accuracy has to be measured. Vectors are stored as float16. A number that is 0 becomes
    +s.

    Attributes:
        per: one scale per matrix ("tensor"), or one for each of its rows along the first dimension ("row").
    """

    summary: ClassVar[str] = "signs and a scale per matrix, about 1 bit per number"

    per: Literal["tensor", "row"] = "tensor"

    def pack(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """bits uint8, scales float32, vectors float16."""
        shapes = shapes_of(tensors)
        groups = {key: self._groups(tensors[key]) for key in matrices(shapes)}
        # in float64 the mean of n equal float32 is that number: coding twice changes nothing
        scales = {key: rows.double().abs().mean(1).float() for key, rows in groups.items()}
        signs = {key: (rows >= 0) | (scales[key] == 0).unsqueeze(1) for key, rows in groups.items()}
        return {
            "bits": pack_bits(flat(signs).bool()),
            "scales": flat(scales),
            "vectors": to_half({key: tensors[key] for key in vectors(shapes)}),
        }

    def unpack(self, packed: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
        """s where the bit is set, else -s."""
        large, small = matrices(shapes), vectors(shapes)
        rows = {key: (shape[0] if self.per == "row" else 1,) for key, shape in large.items()}
        count = numbers(large)
        bits = unflat(unpack_bits(part(packed, "bits", torch.uint8, num_bytes(count)), count), large)
        scales = unflat(part(packed, "scales", torch.float32, numbers(rows)), rows)
        values = {key: _signed(self._groups(bits[key]), scales[key]).reshape(shape) for key, shape in large.items()}
        values |= unflat(part(packed, "vectors", torch.float16, numbers(small)).float(), small)
        return {key: values[key] for key in shapes}

    def _groups(self, matrix: Tensor) -> Tensor:
        """The numbers that share a scale, one group per row."""
        return matrix.flatten(1) if self.per == "row" else matrix.reshape(1, -1)


def _signed(bits: Tensor, scales: Tensor) -> Tensor:
    scale = scales.unsqueeze(1)
    return torch.where(bits, scale, -scale)
