"""Half precision: half the bytes, nearly the same numbers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from cl_adapters.codecs.base import Codec, codecs
from cl_adapters.codecs.packing import numbers, part, to_half, unflat


@codecs.register("fp16")
@dataclass(frozen=True, kw_only=True)
class Fp16(Codec):
    """float16: every number within a relative 2^-11, or an absolute 2^-25 where it is tiny."""

    summary: ClassVar[str] = "float16, 16 bits per number"

    def pack(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """values float16 [n]."""
        return {"values": to_half(tensors)}

    def unpack(self, packed: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
        """float32 of them."""
        return unflat(part(packed, "values", torch.float16, numbers(shapes)).float(), shapes)
