"""Adapters between pools, and single adapters as folders: record.json, adapter.safetensors, knowledge.safetensors.

The record.json of a folder is a manifest with one record, so that older ones are migrated in the same way; "parents"
beside it has the SHA-256 of each parent. In another pool an adapter of the same id may be another one: a parent keeps
its id only where it is the same adapter there, and is otherwise called by id and content, such as
"task-000.0123456789ab". So no merge takes unrelated adapters for one lineage.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cl_adapters._forms import SHA, shown
from cl_adapters._io import check_finite, new_folder, write_bytes, write_json
from cl_adapters.errors import PoolError
from cl_adapters.pool.blobs import from_bytes, read_blob, read_file, sha_of
from cl_adapters.pool.checks import adapter_check, check_knowledge, check_positions
from cl_adapters.pool.disk import Disk
from cl_adapters.pool.edit import Addition, add, files, write
from cl_adapters.pool.manifest import Manifest, check_free, manifest_to_plain, parse_manifest, plain_manifest
from cl_adapters.pool.model_card import CARD, card_bytes
from cl_adapters.pool.record import Record, adapter_file, check_id, knowledge_file
from cl_adapters.pool.store import decode_checked

if TYPE_CHECKING:
    from cl_adapters.backbones.frozen import FrozenBackbone

BY_CONTENT = re.compile(r".+\.[0-9a-f]{12}")
RECORD, ADAPTER, ROWS = "record.json", "adapter.safetensors", "knowledge.safetensors"


def copy(source: Disk, target: Disk, ids: tuple[str, ...]) -> tuple[Record, ...]:
    """Copy adapters, byte by byte; see ``AdapterPool.copy_to``."""
    manifest = source.manifest()
    target.manifest().backbone.check(manifest.backbone, f"pool {source.path} with backbone")
    records = [manifest.get(id) for id in dict.fromkeys(ids)]
    whole = set(manifest.by_id) == {record.id for record in records}
    card = card_bytes(source.path) if whole else None
    added: list[Record] = []

    def edit(present: Manifest) -> Manifest:
        there = _content_of(present.records) | _content_of(records)
        for record in records:
            same = present.by_id.get(record.id)
            if isinstance(same, Record) and dataclasses.replace(same, parents=record.parents) == record:
                continue
            check_free(record.id, present.by_id)
            added.append(_with_parents(record, _content_of(manifest.records), there, keep_unknown=True))
        write(target.path, (files(*_contents(source.path, record)) for record in added))
        # Before the manifest: all adapters are never there without their rule.
        if card is not None and set(present.by_id) <= set(manifest.by_id) and not os.path.lexists(target.path / CARD):
            write_bytes(target.path / CARD, card)
        return present.plus(added)

    target.change(edit)
    return tuple(added)


def export(disk: Disk, folder: Path, id: str) -> Path:
    """Write one adapter as a folder; see ``AdapterPool.export_to``."""
    manifest = disk.manifest()
    record = manifest.get(id)
    contents = _contents(disk.path, record)
    with new_folder(folder) as scratch:
        for name, content in zip((ADAPTER, ROWS), contents, strict=True):
            if content is not None:
                write_bytes(scratch / name, content)
        plain = manifest_to_plain(Manifest(manifest.backbone, (record,)))
        known = _content_of(manifest.records)
        write_json(scratch / RECORD, plain | {"parents": {id: known[id] for id in record.parents if id in known}})
    return folder


def import_folder(disk: Disk, folder: Path, id: str | None, backbone: Callable[[], FrozenBackbone | None]) -> Record:
    """Add an adapter from a folder; see ``AdapterPool.import_from``."""
    if not folder.is_dir():
        raise PoolError(f"no adapter at {folder}: the folder does not exist")
    content = read_file(folder, RECORD)
    manifest = parse_manifest(content, folder / RECORD)
    if len(manifest.entries) != 1:
        raise PoolError(f"{folder / RECORD} has {len(manifest.entries)} records; a folder holds one adapter")
    for entry in manifest.broken:
        raise PoolError(f"{folder / RECORD} cannot be used: the record of {shown(entry.id)} is broken: {entry.reason}")
    present = disk.manifest()
    card = present.backbone
    card.check(manifest.backbone, "this folder with backbone")
    parents = _named_parents(plain_manifest(content, folder / RECORD))
    record = _with_parents(manifest.records[0], parents, _content_of(present.records))
    adapter = rows = None
    if record.adapter_sha is not None:
        whole, where = backbone(), str(folder / ADAPTER)
        adapter = read_blob(folder, ADAPTER, record.adapter_sha, partial(adapter_check, record, backbone=whole))
        decode_checked(adapter, record, whole, where)
    if record.knowledge_sha is not None:
        where, number = str(folder / ROWS), len(record.classes)
        check = partial(check_knowledge, num_classes=number, card=card, where=where)
        rows = read_blob(folder, ROWS, record.knowledge_sha, check)
        knowledge = from_bytes(rows, where)
        check_positions(knowledge, number, where)
        check_finite(knowledge, where, PoolError)
    if id is not None:
        check_id(id)
        record = dataclasses.replace(record, id=id)
    return add(disk, [Addition(record, files(adapter, rows), named=True)])[0]


def _contents(pool: Path, record: Record) -> tuple[bytes | None, bytes | None]:
    """Bytes of adapter and knowledge, their SHA-256 checked."""
    places = ((adapter_file, record.adapter_sha), (knowledge_file, record.knowledge_sha))
    adapter, rows = (None if sha is None else read_blob(pool, place(sha), sha) for place, sha in places)
    return adapter, rows


def _content_of(records: Iterable[Record]) -> dict[str, str | None]:
    """SHA-256 of the adapters by id."""
    return {record.id: record.adapter_sha for record in records}


def _named_parents(plain: Mapping[str, Any]) -> dict[str, str | None]:
    """SHA-256 of the parents in a folder's record.json, which older ones do not have."""
    named = plain.get("parents")
    if not isinstance(named, dict):
        return {}
    return {id: sha for id, sha in named.items() if isinstance(sha, str) and SHA.fullmatch(sha)}


def _with_parents(
    record: Record, known: Mapping[str, str | None], there: Mapping[str, str | None], *, keep_unknown: bool = False
) -> Record:
    """The record as another pool should have it.

    Args:
        record: of this pool.
        known: SHA-256 of the parents here, as far as they are here.
        there: SHA-256 of the other pool's adapters.
        keep_unknown: a parent that is in neither pool keeps its id.
    """
    own = record.adapter_sha or record.knowledge_sha or sha_of(record.id.encode())

    def named(parent: str) -> str:
        content = known.get(parent)
        same = there.get(parent) == content if content is not None else keep_unknown and parent not in there
        return parent if same or BY_CONTENT.fullmatch(parent) else f"{parent[:51]}.{(content or own)[:12]}"

    return dataclasses.replace(record, parents=tuple(map(named, record.parents)))
