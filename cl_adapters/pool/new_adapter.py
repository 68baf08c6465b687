"""What is given to a pool for a new adapter, and how it becomes a record with files."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

from cl_adapters._version import __version__
from cl_adapters.errors import PoolError
from cl_adapters.pool.blobs import sha_of
from cl_adapters.pool.changes import Addition, files
from cl_adapters.pool.manifest import BackboneCard
from cl_adapters.pool.record import PoolClass, Record
from cl_adapters.pool.store import PackedAdapter, named_codec, pack_adapter, pack_knowledge

if TYPE_CHECKING:
    from torch import Tensor

    from cl_adapters.adapters.base import AdapterType
    from cl_adapters.backbones.frozen import FrozenBackbone
    from cl_adapters.codecs import Codec


@dataclass(frozen=True, kw_only=True)
class NewAdapter:
    """An adapter for :meth:`AdapterPool.add_all`; attributes are the arguments of :meth:`AdapterPool.add`."""

    tensors: Mapping[str, Tensor]
    adapter: AdapterType | None
    classes: Iterable[PoolClass]
    id: str | None = None
    knowledge: Mapping[str, Tensor] | None = None
    tags: Iterable[str] = ()
    parents: Iterable[str] = ()
    merge: Mapping[str, Any] | None = None
    compression: str | Codec | None = None
    benchmark: str | None = None
    metrics: Mapping[str, float] | None = None
    task: int | None = None


def addition(new: NewAdapter, backbone: Callable[[], FrozenBackbone], card: BackboneCard) -> Addition:
    """Check a new adapter and make it a record with files.

    Args:
        new: what was given.
        backbone: gives the pool's, asked only where there are tensors.
        card: of the pool's backbone.

    Raises:
        PoolError: tensors that are not the type's at the backbone's sites, bad values.
    """
    from cl_adapters.adapters.base import adapter_to_plain

    known = tuple(new.classes)
    codec, compressed = named_codec(new.compression)
    packed = pack(new.tensors, new.adapter, codec, backbone)
    rows = pack_knowledge(new.knowledge, len(known), card) if new.knowledge else None
    record = Record(
        id="unnamed" if new.id is None else new.id,
        adapter=None if new.adapter is None else adapter_to_plain(new.adapter),
        blocks=() if packed is None else packed.blocks,
        classes=known,
        task=new.task,
        adapter_sha=None if packed is None else packed.sha,
        knowledge_sha=None if rows is None else sha_of(rows),
        num_parameters=0 if packed is None else packed.num_parameters,
        tags=tuple(new.tags),
        parents=tuple(new.parents),
        merge=None if new.merge is None else dict(new.merge),
        compression=compressed,
        benchmark=new.benchmark,
        metrics=dict(new.metrics or {}),
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        library_version=__version__,
    )
    return Addition(record, files(None if packed is None else packed.content, rows), named=new.id is not None)


def pack(
    tensors: Mapping[str, Tensor],
    adapter: AdapterType | None,
    codec: Codec | None,
    backbone: Callable[[], FrozenBackbone],
) -> PackedAdapter | None:
    """Tensors as a file; None where the bare backbone answers.

    Raises:
        PoolError: not the type's tensors, or tensors without a type.
    """
    if adapter is not None:
        return pack_adapter(tensors, adapter, backbone(), codec)
    if tensors:
        raise PoolError("tensors without an adapter type; pass adapter=..., or no tensors")
    return None
