"""Adapters between pools, and single adapters as folders: record.json, adapter.safetensors, knowledge.safetensors.

The record.json of a folder is a manifest with one record, so that older ones are migrated in the same way.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from cl_adapters.errors import PoolError
from cl_adapters.files import write_bytes
from cl_adapters.pool.blobs import from_bytes, read_blob, read_file
from cl_adapters.pool.changes import Addition, add, files, write
from cl_adapters.pool.checks import adapter_check, check_fingerprint, check_knowledge, check_positions
from cl_adapters.pool.disk import Disk
from cl_adapters.pool.manifest import Manifest, manifest_to_plain, parse_manifest
from cl_adapters.pool.model_card import CARD, card_bytes, has_card
from cl_adapters.pool.record import Record, adapter_file, check_id, knowledge_file, shown
from cl_adapters.pool.store import decode_checked

if TYPE_CHECKING:
    from cl_adapters.backbone import FrozenBackbone

RECORD, ADAPTER, ROWS = "record.json", "adapter.safetensors", "knowledge.safetensors"


def copy(source: Disk, target: Disk, ids: tuple[str, ...]) -> tuple[Record, ...]:
    """Copy adapters, byte by byte; see ``AdapterPool.copy_to``."""
    manifest = source.manifest()
    check_fingerprint(target.manifest().backbone, manifest.backbone, f"pool {source.path} with backbone")
    records = [manifest.get(id) for id in dict.fromkeys(ids)]
    whole = set(manifest.by_id) == {record.id for record in records}
    card = card_bytes(source.path) if whole else None
    added: list[Record] = []

    def edit(present: Manifest) -> Manifest:
        for record in records:
            if present.by_id.get(record.id) == record:
                continue
            present.check_free(record.id)
            added.append(record)
        write(target.path, (files(*_contents(source.path, record)) for record in added))
        # Before the manifest: all adapters are never there without their rule.
        if card is not None and set(present.by_id) <= set(manifest.by_id) and not has_card(target.path):
            write_bytes(target.path / CARD, card)
        return present.plus(added)

    target.change(edit)
    return tuple(added)


def export(disk: Disk, folder: Path, id: str) -> Path:
    """Write one adapter as a folder; see ``AdapterPool.export_to``."""
    from cl_adapters.storage import new_folder, write_bytes, write_json

    manifest = disk.manifest()
    record = manifest.get(id)
    contents = _contents(disk.path, record)
    with new_folder(folder) as scratch:
        for name, content in zip((ADAPTER, ROWS), contents, strict=True):
            if content is not None:
                write_bytes(scratch / name, content)
        write_json(scratch / RECORD, manifest_to_plain(Manifest(manifest.backbone, (record,))))
    return folder


def import_folder(disk: Disk, folder: Path, id: str | None, backbone: FrozenBackbone | None) -> Record:
    """Add an adapter from a folder; see ``AdapterPool.import_from``."""
    if not folder.is_dir():
        raise PoolError(f"no adapter at {folder}: the folder does not exist")
    manifest = parse_manifest(read_file(folder, RECORD), folder / RECORD)
    if len(manifest.entries) != 1:
        raise PoolError(f"{folder / RECORD} has {len(manifest.entries)} records; a folder holds one adapter")
    for entry in manifest.broken:
        raise PoolError(f"{folder / RECORD} cannot be used: the record of {shown(entry.id)} is broken: {entry.reason}")
    card = disk.manifest().backbone
    check_fingerprint(card, manifest.backbone, "this folder with backbone")
    record = manifest.records[0]
    adapter = rows = None
    if record.adapter_sha is not None:
        adapter = read_blob(folder, ADAPTER, record.adapter_sha, partial(adapter_check, record, backbone=backbone))
        decode_checked(adapter, record, backbone, str(folder / ADAPTER))
    if record.knowledge_sha is not None:
        where, number = str(folder / ROWS), len(record.classes)
        check = partial(check_knowledge, num_classes=number, card=card, where=where)
        rows = read_blob(folder, ROWS, record.knowledge_sha, check)
        check_positions(from_bytes(rows, where), number, where)
    if id is not None:
        check_id(id)
        record = dataclasses.replace(record, id=id)
    return add(disk, [Addition(record, files(adapter, rows), named=True)])[0]


def _contents(pool: Path, record: Record) -> tuple[bytes | None, bytes | None]:
    """Bytes of adapter and knowledge, their SHA-256 checked."""
    places = ((adapter_file, record.adapter_sha), (knowledge_file, record.knowledge_sha))
    adapter, rows = (None if sha is None else read_blob(pool, place(sha), sha) for place, sha in places)
    return adapter, rows
