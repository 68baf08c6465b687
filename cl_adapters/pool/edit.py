"""The changes of a pool: each stores its new files and gives the new manifest, as the pool's only writer.

A new adapter becomes a record with files before that, outside the lock.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cl_adapters._forms import shown
from cl_adapters._version import __version__
from cl_adapters.backbones.card import BackboneCard
from cl_adapters.errors import PoolError
from cl_adapters.pool.blobs import delete, sha_of, sync_folders, write_blob
from cl_adapters.pool.disk import Disk
from cl_adapters.pool.manifest import Broken, Manifest, check_free
from cl_adapters.pool.record import PoolClass, Record, adapter_file, check_id, knowledge_file
from cl_adapters.pool.store import PackedAdapter, named_codec, pack_adapter, pack_knowledge

if TYPE_CHECKING:
    from torch import Tensor

    from cl_adapters.adapters.base import AdapterType
    from cl_adapters.backbones.frozen import FrozenBackbone
    from cl_adapters.codecs import Codec

Files = tuple[tuple[Callable[[str], str], bytes | None], ...]


def files(adapter: bytes | None, knowledge: bytes | None) -> Files:
    """New files of a record, with their places below the pool."""
    return ((adapter_file, adapter), (knowledge_file, knowledge))


def write(pool: Path, new: Iterable[Files]) -> None:
    """Store new files of records; to be called inside a change."""
    for each in new:
        for place, content in each:
            if content is not None:
                write_blob(pool, place, content)
    sync_folders(pool)


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


@dataclass(frozen=True)
class Addition:
    """A record that is to be added.

    Attributes:
        record: complete but for the id where it is not ``named``.
        new: its files.
        named: False: the record gets the first free of "task-000", "task-001", ...
    """

    record: Record
    new: Files
    named: bool


def addition(new: NewAdapter, backbone: Callable[[], FrozenBackbone], card: BackboneCard) -> Addition:
    """Check a new adapter and make it a record with files; the backbone is loaded only where there are tensors.

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


def add(disk: Disk, additions: Iterable[Addition]) -> tuple[Record, ...]:
    """Add records with their files: all of them in one new manifest, or none.

    They are read one by one, each stored before the next is made; the pool has no other writer meanwhile.

    Raises:
        PoolError: an id is taken.
    """
    added: list[Record] = []

    def edit(manifest: Manifest) -> Manifest:
        taken, written = set(manifest.by_id), set[str]()
        parents = {id for record in manifest.records for id in record.parents}  # also of what is gone: no new one's id

        def stored() -> Iterator[Files]:
            for each in additions:
                final = each.record if each.named else dataclasses.replace(each.record, id=_free(taken | parents))
                check_free(final.id, taken)
                written.update(final.files)
                yield each.new
                taken.add(final.id)
                added.append(final)

        try:
            write(disk.path, stored())
        except BaseException:
            for name in sorted(written - manifest.files):
                delete(disk.path, name)
            raise
        return manifest.plus(added)

    disk.change(edit)
    return tuple(added)


def replace(disk: Disk, record: Record, new: Files) -> Record:
    """Put ``record`` in the place of the one of its id; see ``AdapterPool.replace``."""
    fresh_adapter, fresh_knowledge = (content is not None for _, content in new)

    def edit(manifest: Manifest) -> Manifest:
        present = manifest.get(record.id)
        if not fresh_adapter:
            _check_kept("tensors", present.adapter_sha, record.adapter_sha, record.id)
            for key in ("compression", "num_parameters", "blocks"):
                if record.adapter_sha is not None and getattr(record, key) != getattr(present, key):
                    raise PoolError(f"{key} of adapter {record.id!r} follows from its tensors: give those to replace")
        if not fresh_knowledge:
            _check_kept("knowledge", present.knowledge_sha, record.knowledge_sha, record.id)
            if record.knowledge_sha is not None and len(record.classes) != len(present.classes):
                raise PoolError(
                    f"adapter {record.id!r} would have {len(record.classes)} classes, but its knowledge has rows for "
                    f"{len(present.classes)}: give the new knowledge to replace"
                )
        write(disk.path, [new])
        return manifest.mapped(lambda entry: record if entry.id == record.id else entry)

    disk.change(edit)
    return record


def remove(disk: Disk, id: str) -> None:
    """Take a record out, also a broken one."""

    def edit(manifest: Manifest) -> Manifest:
        if not isinstance(manifest.by_id.get(id), Broken):
            manifest.get(id)
        return Manifest(manifest.backbone, tuple(entry for entry in manifest.entries if entry.id != id))

    disk.change(edit)


def rename(disk: Disk, old: str, new: str) -> Record:
    """Give a record another id, also where it is a parent."""
    check_id(new)

    def edit(manifest: Manifest) -> Manifest:
        manifest.get(old)
        check_free(new, manifest.by_id)

        def renamed(record: Record) -> Record:
            if record.id != old and old not in record.parents:
                return record
            parents = tuple(new if parent == old else parent for parent in record.parents)
            return dataclasses.replace(record, id=new if record.id == old else record.id, parents=parents)

        return manifest.mapped(renamed)

    return disk.change(edit).get(new)


def tag(disk: Disk, id: str, add: Iterable[str], remove: Iterable[str]) -> Record:
    """Add and remove tags."""

    def edit(manifest: Manifest) -> Manifest:
        present = manifest.get(id)
        tags = [tag for tag in dict.fromkeys([*present.tags, *add]) if tag not in set(remove)]
        tagged = dataclasses.replace(present, tags=tuple(tags))
        return manifest.mapped(lambda entry: tagged if entry.id == id else entry)

    return disk.change(edit).get(id)


def migrate(disk: Disk) -> int:
    """Write the manifest in the current schema; returns the one that it had."""
    found: list[int] = []

    def edit(manifest: Manifest) -> Manifest:
        found.append(manifest.schema_version)
        return manifest

    disk.change(edit)
    return found[0]


def _free(taken: Container[str]) -> str:
    return next(id for id in (f"task-{number:03d}" for number in count()) if id not in taken)


def _check_kept(what: str, present: str | None, given: str | None, id: str) -> None:
    if given not in (present, None):
        raise PoolError(
            f"{what} of adapter {shown(id)} have changed since this record was read, or never were in the pool: get "
            "the record again, or give the new ones to replace"
        )
