"""From tensors to the pool's files and back, everything checked on both ways."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from cl_adapters._forms import shown
from cl_adapters._io import check_finite
from cl_adapters.backbones.card import BackboneCard
from cl_adapters.errors import ClAdaptersError, PoolError
from cl_adapters.pool.blobs import from_bytes, read_blob, sha_of, to_bytes
from cl_adapters.pool.checks import (
    adapter_check,
    blocks_of,
    check_adapter,
    check_knowledge,
    check_positions,
    count,
)
from cl_adapters.pool.header import DTYPES, Declared, Header
from cl_adapters.pool.record import Record, adapter_file, knowledge_file

if TYPE_CHECKING:
    from torch import Tensor

    from cl_adapters.adapters.base import AdapterType
    from cl_adapters.backbones.frozen import FrozenBackbone
    from cl_adapters.codecs import Codec


@dataclass(frozen=True)
class PackedAdapter:
    """An adapter ready to be stored.

    Attributes:
        content: bytes of its safetensors file.
        blocks: indices of the blocks that it has tensors for.
        num_parameters: numbers in it, before compression.
    """

    content: bytes
    blocks: tuple[int, ...]
    num_parameters: int

    @property
    def sha(self) -> str:
        """SHA-256 of the content."""
        return sha_of(self.content)


def named_codec(compression: str | Codec | None) -> tuple[Codec | None, str | None]:
    """A codec and its name, from either.

    Raises:
        UnknownName: no such codec.
    """
    if compression is None:
        return None, None
    from cl_adapters.codecs import codec_from, codecs

    codec = codec_from(compression)
    return codec, codecs.name_of(codec)


def pack_adapter(
    tensors: Mapping[str, Tensor], adapter: AdapterType, backbone: FrozenBackbone, codec: Codec | None
) -> PackedAdapter:
    """Check an adapter's tensors (float32 or half precision) and make them into a file; ``codec`` None: float32.

    Raises:
        PoolError: not the type's tensors, or not finite.
    """
    header = header_of(tensors, "these tensors")
    check_adapter(header, backbone, adapter, "this adapter")
    check_finite(tensors, "this adapter", PoolError)
    plain = {key: value.detach().cpu().float() for key, value in tensors.items()}
    content = to_bytes(plain if codec is None else codec.encode(plain)[0])
    return PackedAdapter(content, blocks_of(header, backbone, adapter), count(header))


def pack_knowledge(knowledge: Mapping[str, Tensor], num_classes: int, card: BackboneCard) -> bytes:
    """Check the rows of a record's classes and make them into a file.

    Raises:
        PoolError: names, shapes or positions that are not those of this many classes; numbers that are not finite.
    """
    where = "this knowledge"
    check_knowledge(header_of(knowledge, where), num_classes, card, where)
    check_positions(knowledge, num_classes, where)
    check_finite(knowledge, where, PoolError)
    return to_bytes(knowledge)


def load_adapter(pool: Path, record: Record, backbone: FrozenBackbone | None) -> dict[str, Tensor]:
    """Read an adapter: float32, decompressed; no tensors where the bare backbone answers.

    With a backbone the tensors are checked against its sites.

    Raises:
        PoolError: the file is missing, altered, or not what the record says.
    """
    if record.adapter_sha is None:
        return {}
    file = adapter_file(record.adapter_sha)
    content = read_blob(pool, file, record.adapter_sha, partial(adapter_check, record, backbone=backbone))
    return decode_checked(content, record, backbone, str(pool / file))


def decode_checked(content: bytes, record: Record, backbone: FrozenBackbone | None, where: str) -> dict[str, Tensor]:
    """Make an adapter's file, already checked as a file, into float32 tensors.

    Raises:
        PoolError: it is not what its record says.
    """
    tensors = from_bytes(content, where)
    if record.compression is not None:
        named = f"adapter {record.id!r}"
        tensors = _decoded(tensors, named)
        adapter_check(record, header_of(tensors, named), backbone, decoded=True)
    check_finite(tensors, where, PoolError)
    return {key: value.float() for key, value in tensors.items()}


def load_knowledge(pool: Path, card: BackboneCard, record: Record) -> dict[str, Tensor]:
    """Read the rows of a record's classes; empty where it has none.

    Raises:
        PoolError: the file is missing, altered, or not what the record says.
    """
    if record.knowledge_sha is None:
        return {}
    where = f"knowledge of adapter {record.id!r}"
    file = knowledge_file(record.knowledge_sha)
    num_classes = len(record.classes)
    rows = partial(check_knowledge, num_classes=num_classes, card=card, where=where)
    content = read_blob(pool, file, record.knowledge_sha, rows)
    knowledge = from_bytes(content, str(pool / file))
    check_positions(knowledge, num_classes, where)
    check_finite(knowledge, str(pool / file), PoolError)
    return knowledge


def header_of(tensors: Mapping[str, Tensor], where: str) -> Header:
    """Names, types and shapes of tensors in memory, as their file would declare them.

    Raises:
        PoolError: they are not tensors that a file can hold.
    """
    import torch

    header: Header = {}
    for key, value in tensors.items():
        if not isinstance(key, str) or not isinstance(value, torch.Tensor):
            raise PoolError(f"{where}: {shown(key)} is {type(value).__name__}; names and tensors are expected")
        dtype = str(value.dtype).removeprefix("torch.")
        header[key] = Declared(DTYPES.get(dtype, dtype), tuple(value.shape))
    return header


def _decoded(tensors: dict[str, Tensor], where: str) -> dict[str, Tensor]:
    from cl_adapters.codecs import decode

    try:
        return decode(tensors)
    except (ClAdaptersError, KeyError, ValueError, RuntimeError, IndexError, TypeError) as error:
        raise PoolError(f"{where} cannot be decompressed: {error}") from error
