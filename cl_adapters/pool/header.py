"""The header of a safetensors file, checked against the file's size before anything is read by it.

Layout of the format: 8 bytes length n of the header, little-endian; n bytes of JSON; the tensors' bytes.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from cl_adapters._forms import clipped, shown
from cl_adapters._io import parse_json
from cl_adapters.errors import PoolError

LONGEST_HEADER = 100_000_000
"""Bytes; the limit of the safetensors format."""
ITEM_BYTES = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3"), 1),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 2),
    **dict.fromkeys(("I32", "U32", "F32"), 4),
    **dict.fromkeys(("I64", "U64", "F64"), 8),
}
DTYPES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint8": "U8",
    "bool": "BOOL",
}
"""PyTorch's names of types to those of the format."""


class Declared(NamedTuple):
    """What a header says of one tensor."""

    dtype: str
    shape: tuple[int, ...]


Header = dict[str, Declared]


def parse_header(head: bytes, size: int, where: object) -> Header:
    """The tensors that a safetensors file of ``size`` bytes declares; ``head``: at least all of its header.

    Raises:
        PoolError: not safetensors, or the declared sizes are not those of the file.
    """
    length = header_length(head, size, where)
    try:
        plain = parse_json(head[8 : 8 + length], object_pairs_hook=_unique, parse_constant=str)
    except ValueError as error:
        raise _foreign(where, f"its header is no JSON ({clipped(str(error), 80)})") from error
    if not isinstance(plain, dict):
        raise _foreign(where, "its header is no JSON object")
    plain.pop("__metadata__", None)
    header, spans = {}, []
    for key, value in plain.items():
        header[key], span = _declared(key, value, where)
        spans.append(span)
    end = 0
    for start, stop in sorted(spans):
        if start != end:
            raise _foreign(where, "its tensors overlap, or leave holes")
        end = stop
    if end != size - 8 - length:
        raise PoolError(
            f"{where} is damaged: its tensors take {end} bytes, but {size - 8 - length} follow its header; restore a "
            "copy, or remove the adapter"
        )
    return header


def header_length(head: bytes, size: int, where: object) -> int:
    """Bytes of the header's JSON in a file of ``size`` bytes; ``head``: the first 8 of them, or more.

    Raises:
        PoolError: more than the file has.
    """
    length = int.from_bytes(head[:8], "little")
    if size < 8 or length > min(size - 8, LONGEST_HEADER):
        raise _foreign(where, f"it has {size} bytes and declares a header of {length}")
    return length


def _declared(key: str, value: Any, where: object) -> tuple[Declared, tuple[int, int]]:
    """One entry of a header, with its span of bytes."""
    value = value if isinstance(value, dict) else {}
    dtype, shape, span = value.get("dtype"), value.get("shape"), value.get("data_offsets")
    known = isinstance(dtype, str) and dtype in ITEM_BYTES and _sizes(shape) and _sizes(span) and len(span) == 2
    if not known:
        raise _foreign(where, f"its header describes {shown(key)} in no known form")
    if math.prod(shape) * ITEM_BYTES[dtype] != span[1] - span[0]:
        raise _foreign(where, f"the shape of {shown(key)} is not that of its {span[1] - span[0]} bytes")
    return Declared(dtype, tuple(shape)), (span[0], span[1])


def _sizes(value: Any) -> bool:
    return (
        isinstance(value, list) and len(value) <= 16 and all(type(item) is int and 0 <= item < 2**63 for item in value)
    )


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    plain = dict(pairs)
    if len(plain) < len(pairs):
        raise ValueError("a key stands there twice")
    return plain


def _foreign(where: object, reason: str) -> PoolError:
    return PoolError(
        f"{where} is not a safetensors file, or truncated: {reason}; restore a copy, or remove the adapter"
    )
