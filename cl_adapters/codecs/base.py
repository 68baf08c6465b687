"""What a codec is: an adapter's tensors to a few packed ones, and back as float32.

An encoded adapter is again a dict of plain tensors. It describes itself: the tensor "codec" holds its name, options and
the names and shapes of what was encoded, as compressed JSON, so that :func:`decode` needs nothing else. All of an
adapter's numbers lie in one packed tensor per purpose, since in a small file the names of many tensors would cost more
than their bits.

Matrices are what a codec compresses. Single numbers and vectors (biases, norms, scales) are few and sensitive; the
codecs below 8 bits store them as float16.
"""

from __future__ import annotations

import hashlib
import json
import math
import zlib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor

from cl_adapters.config import build, build_named, to_plain
from cl_adapters.errors import ClAdaptersError, StorageError
from cl_adapters.registry import Registry

HEADER = "codec"
"""Name of the tensor (uint8) that says what the others are."""
VERSION = 1
LIMIT = 2**28
"""Most numbers that are decoded: an adapter is smaller, and a forged header shall not fill the memory."""
LONGEST = 2**22
"""Most bytes of a description."""


class Codec(ABC):
    """Base of the codecs: frozen dataclasses of options."""

    summary: ClassVar[str] = ""

    @abstractmethod
    def pack(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Packed tensors from float32 ones, none of which is empty; the order is that of the names."""

    @abstractmethod
    def unpack(self, packed: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
        """The inverse of :meth:`pack`, float32.

        Raises:
            StorageError: packed tensors that these shapes do not explain.
        """

    def encode(
        self, tensors: Mapping[str, Tensor], base: Mapping[str, Tensor] | None = None
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Compress an adapter.

        Args:
            tensors: floating point, any shapes, none empty.
            base: tensors of the same names and shapes, such as the adapter that this one was trained from; only the
                difference is stored, and decoding needs the base again. None: 0.

        Returns:
            The packed tensors, and a JSON-ready note: codec, options, bytes before and after (as safetensors), and the
            error, the Frobenius norm of the change over that of the tensors.

        Raises:
            ClAdaptersError: tensors that are empty, not finite or not floating point, or a base that does not fit.
        """
        full = {key: _checked(key, tensors[key]) for key in sorted(tensors)}
        start = None if base is None else _fitting(base, full)
        packed = self.pack(full if start is None else {key: value - start[key] for key, value in full.items()})
        packed[HEADER] = _header(
            {
                "codec": codecs.name_of(self),
                "version": VERSION,
                "options": to_plain(self),
                "shapes": {key: list(value.shape) for key, value in full.items()},
                "base": None if start is None else fingerprint(start),
            }
        )
        decoded = decode(packed, base)
        note = {
            "codec": codecs.name_of(self),
            "options": to_plain(self),
            "original_bytes": compressed_bytes(full),
            "bytes": compressed_bytes(packed),
            "error": relative_error(decoded, full),
        }
        return packed, note


codecs: Registry[type[Codec]] = Registry("codec", "cl_adapters.codecs", group="cl_adapters.codecs")


def codec_from(value: str | Mapping[str, Any] | Codec) -> Codec:
    """A codec from its name, or from a mapping with "type" and its options.

    Raises:
        UnknownName: no such codec.
        ConfigError: unknown option, wrong type or range.
    """
    return value if isinstance(value, Codec) else build_named(codecs, value, "codec")


def is_encoded(tensors: Mapping[str, Tensor]) -> bool:
    """Whether these tensors come from a codec."""
    return HEADER in tensors


def decode(packed: Mapping[str, Tensor], base: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """The tensors of an encoded adapter, float32 in their shapes.

    Args:
        packed: from :meth:`Codec.encode`.
        base: the one that was given there.

    Raises:
        StorageError: not an encoded adapter, or a damaged one.
        UnknownName: the codec is not installed.
        ClAdaptersError: the base is missing or another one.
    """
    header = _read_header(packed)
    codec = build(codecs.get(header["codec"]), header["options"], "codec")
    shapes = {key: tuple(shape) for key, shape in header["shapes"].items()}
    tensors = codec.unpack(packed, shapes)
    if header["base"] is None:
        return tensors
    if base is None:
        raise ClAdaptersError("this adapter is stored as the difference to another one; pass that one as base")
    start = _fitting(base, tensors)
    if fingerprint(start) != header["base"]:
        raise ClAdaptersError("the base is not the adapter that this one was stored as the difference to")
    return {key: start[key] + value for key, value in tensors.items()}


def compressed_bytes(tensors: Mapping[str, Tensor]) -> int:
    """Size of the tensors as a safetensors file, its own header included."""
    return len(save({key: value.detach().cpu().contiguous() for key, value in tensors.items()}))


def relative_error(now: Mapping[str, Tensor], full: Mapping[str, Tensor]) -> float:
    """Frobenius norm of the change of all tensors together, over theirs before it."""
    lost = sum(float((now[key] - full[key]).double().square().sum()) for key in full)
    size = sum(float(value.double().square().sum()) for value in full.values())
    return math.sqrt(lost / size) if size else 0.0


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, shapes and float32 values."""
    digest = hashlib.sha256()
    for key in sorted(tensors):
        value = tensors[key].detach().cpu().float().contiguous()
        digest.update(f"{key}:{tuple(value.shape)}".encode())
        digest.update(value.numpy().tobytes())
    return digest.hexdigest()


def _checked(key: str, value: Tensor) -> Tensor:
    if not value.is_floating_point() or not value.numel() or not value.isfinite().all():
        raise ClAdaptersError(
            f"tensor {key!r} cannot be compressed: it must hold finite floating-point numbers and at least one, got "
            f"{value.dtype} {list(value.shape)}"
        )
    return value.detach().cpu().float().contiguous()


def _fitting(base: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    shapes, expected = ({key: tuple(value.shape) for key, value in one.items()} for one in (base, tensors))
    if shapes != expected:
        wrong = sorted(key for key in shapes.keys() | expected.keys() if shapes.get(key) != expected.get(key))[0]
        raise ClAdaptersError(
            f"the base does not fit the adapter: {wrong!r} is {expected.get(wrong)} here and {shapes.get(wrong)} there"
        )
    return {key: _checked(key, base[key]) for key in tensors}


# --- the header --------------------------------------------------------------------------------------------------


def _header(content: dict[str, Any]) -> Tensor:
    text = json.dumps(content, separators=(",", ":"), allow_nan=False).encode()
    return torch.from_numpy(np.frombuffer(zlib.compress(text, 9), np.uint8).copy())


def _read_header(packed: Mapping[str, Tensor]) -> dict[str, Any]:
    if HEADER not in packed:
        raise StorageError(f"no encoded adapter: there is no tensor {HEADER!r}")
    try:
        stream = zlib.decompressobj()
        text = stream.decompress(packed[HEADER].numpy().tobytes(), LONGEST)
        if not stream.eof:
            raise ValueError("it is cut off or too long")
        content = json.loads(text)
        version, shapes = content["version"], content["shapes"]
        named = isinstance(content["codec"], str) and isinstance(content["options"], dict) and "base" in content
        whole = all(
            isinstance(shape, list) and all(type(size) is int and size > 0 for size in shape)
            for shape in shapes.values()
        )
    except (zlib.error, ValueError, KeyError, TypeError, AttributeError) as error:
        raise StorageError(f"the encoded adapter's description is damaged: {error}") from error
    if version != VERSION:
        raise StorageError(
            f"the adapter was encoded in version {version}, this cl-adapters reads {VERSION}; upgrade it"
        )
    if not named or not whole or not shapes or sum(math.prod(shape) for shape in shapes.values()) > LIMIT:
        raise StorageError(f"the encoded adapter's description is damaged or names more than {LIMIT} numbers")
    assert isinstance(content, dict)
    return content
