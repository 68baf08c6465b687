"""What the codecs share: flat vectors, packed bits, and the Elias-Fano code of sorted positions."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from cl_adapters.errors import ClAdaptersError, StorageError

Shapes = Mapping[str, tuple[int, ...]]

LARGEST = 65504.0
"""The largest float16."""


def flat(tensors: Mapping[str, Tensor]) -> Tensor:
    """All numbers in one vector, in the order of the names."""
    return torch.cat([value.reshape(-1) for value in tensors.values()]) if tensors else torch.zeros(0)


def unflat(values: Tensor, shapes: Shapes) -> dict[str, Tensor]:
    """The inverse of :func:`flat`."""
    sizes = [math.prod(shape) for shape in shapes.values()]
    parts = values.split(sizes) if sizes else ()
    return {key: part.reshape(shapes[key]).clone() for key, part in zip(shapes, parts, strict=True)}


def matrices(shapes: Shapes) -> dict[str, tuple[int, ...]]:
    """Those with at least two dimensions."""
    return {key: shape for key, shape in shapes.items() if len(shape) > 1}


def vectors(shapes: Shapes) -> dict[str, tuple[int, ...]]:
    """The others."""
    return {key: shape for key, shape in shapes.items() if len(shape) < 2}


def shapes_of(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Shape of each tensor."""
    return {key: tuple(value.shape) for key, value in tensors.items()}


def numbers(shapes: Shapes) -> int:
    """All numbers together."""
    return sum(math.prod(shape) for shape in shapes.values())


def to_half(tensors: Mapping[str, Tensor]) -> Tensor:
    """float16 of all numbers.

    Raises:
        ClAdaptersError: a number is out of float16's range.
    """
    for key, value in tensors.items():
        if value.abs().max() > LARGEST:
            raise ClAdaptersError(f"tensor {key!r} has numbers beyond {LARGEST}, the largest float16; use codec 'int8'")
    return flat(tensors).half()


def part(packed: Mapping[str, Tensor], name: str, dtype: torch.dtype, size: int) -> Tensor:
    """One packed tensor, checked.

    Raises:
        StorageError: it is missing, or of another type or size.
    """
    found = packed.get(name)
    if found is None or found.dtype != dtype or tuple(found.shape) != (size,):
        got = "nothing" if found is None else f"{found.dtype} {list(found.shape)}"
        raise StorageError(f"the encoded adapter is damaged: {name!r} must be {dtype} [{size}], got {got}")
    return found


def num_bytes(bits: int) -> int:
    """Bytes that hold so many bits."""
    return (bits + 7) // 8


def pack_bits(bits: Tensor) -> Tensor:
    """Bool of any shape to uint8 [ceil(n / 8)], the first bit highest."""
    return torch.from_numpy(np.packbits(bits.reshape(-1).numpy()))


def unpack_bits(packed: Tensor, count: int) -> Tensor:
    """Bool [count] from uint8."""
    return torch.from_numpy(np.unpackbits(packed.numpy(), count=count).astype(bool))


def pack_positions(positions: Tensor, total: int) -> dict[str, Tensor]:
    """Elias-Fano code of ascending positions, at most 2 + log2(total / count) bits each (Elias 1974, Fano 1971).

    The low bits of each position are stored as they are; of the high parts the differences, in unary.

    Args:
        positions: int64 [K], strictly ascending, in [0, total).
        total: number of places.
    """
    width = _low_bits(len(positions), total)
    low = positions.unsqueeze(1) >> torch.arange(width)
    high = torch.zeros(len(positions) + (total >> width) + 1, dtype=torch.bool)
    high[(positions >> width) + torch.arange(len(positions))] = True
    return {"low": pack_bits((low & 1).bool()), "high": pack_bits(high)}


def unpack_positions(packed: Mapping[str, Tensor], count: int, total: int) -> Tensor:
    """The inverse of :func:`pack_positions`, int64 [count].

    Raises:
        StorageError: the bits are not the code of so many positions.
    """
    width = _low_bits(count, total)
    length = count + (total >> width) + 1
    high = unpack_bits(part(packed, "high", torch.uint8, num_bytes(length)), length).nonzero().flatten()
    low = unpack_bits(part(packed, "low", torch.uint8, num_bytes(count * width)), count * width)
    if len(high) != count:
        raise StorageError(f"the encoded adapter is damaged: {len(high)} positions instead of {count}")
    bits = (low.reshape(count, width).long() << torch.arange(width)).sum(1)
    positions = ((high - torch.arange(count)) << width) + bits
    if count and (int(positions[-1]) >= total or bool((positions.diff() <= 0).any())):
        raise StorageError("the encoded adapter is damaged: positions out of order or out of range")
    return positions


def _low_bits(count: int, total: int) -> int:
    return max(0, (total // count).bit_length() - 1) if count else total.bit_length()
