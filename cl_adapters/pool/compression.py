"""Compressing the stored adapters of a pool."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from cl_adapters._io import new_folder, write_json
from cl_adapters.codecs.base import codec_from, codecs, relative_error
from cl_adapters.errors import PoolError
from cl_adapters.pool.copies import copy_pool
from cl_adapters.pool.model_card import CARD, anchor_of, read_card
from cl_adapters.pool.pool import AdapterPool
from cl_adapters.pool.record import adapter_file

if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

    from cl_adapters.codecs import Codec
    from cl_adapters.pool.record import Record


@dataclass(frozen=True, kw_only=True)
class Compressed:
    """One adapter, compressed.

    Attributes:
        id: of its record.
        codec: registered name.
        before: bytes of the stored tensors before.
        after: bytes now.
        error: Frobenius norm of the change over that of the tensors as they were stored before.
    """

    id: str
    codec: str
    before: int
    after: int
    error: float


def compress_records(
    pool: AdapterPool, codec: str | Mapping[str, Any] | Codec, ids: Sequence[str] | None = None
) -> tuple[Compressed, ...]:
    """Store adapters in fewer bits, each in one step; what was lost cannot be had back.

    Args:
        pool: changed in place. Keys and heads stay as they are.
        codec: by name, or {"type": name, ...} with options.
        ids: default all adapters with tensors. One that is compressed already goes through both codecs.

    Raises:
        UnknownName: no such adapter or codec.
        ConfigError: options that are not the codec's.
        PoolError: an adapter without tensors, asked for by id.
    """
    chosen = codec_from(codec)
    records = (
        [record for record in pool.records if record.adapter is not None] if ids is None else list(map(pool.get, ids))
    )
    for record in records:
        if record.adapter is None:
            raise PoolError(f"{record.id!r} is answered by the bare backbone: there are no tensors to compress")
    done, anchor = [], anchor_of(read_card(pool.path), pool.records)
    for record in records:
        full, before = pool.tensors(record.id), _stored(pool, record.adapter_sha)
        new = pool.replace(replace(record, compression=codecs.name_of(chosen)), full, codec=chosen)
        error = relative_error(pool.tensors(record.id), full)
        after = _stored(pool, new.adapter_sha)
        done.append(Compressed(id=record.id, codec=codecs.name_of(chosen), before=before, after=after, error=error))
    _follow(pool, anchor)
    return tuple(done)


def compressed_copy(
    pool: AdapterPool,
    to: Path,
    codec: str | Mapping[str, Any] | Codec,
    ids: Sequence[str] | None = None,
) -> None:
    """Write a new pool of these adapters in fewer bits, whole or not at all; ``pool`` stays.

    Raises:
        As :func:`compress_records`; StorageError: the folder is there already.
    """
    with new_folder(to) as folder:
        compress_records(copy_pool(pool, folder, ids), codec)


def _stored(pool: AdapterPool, sha: str | None) -> int:
    return 0 if sha is None else (pool.path / adapter_file(sha)).stat().st_size


def _follow(pool: AdapterPool, anchor: Record | None) -> None:
    """The predictor's own adapter is named by content too, which may be another now."""
    if anchor is not None and anchor.id in pool:
        card, now = read_card(pool.path), [anchor.id, pool.get(anchor.id).adapter_sha]
        if now != card.get("anchor"):
            write_json(pool.path / CARD, card | {"anchor": now})
