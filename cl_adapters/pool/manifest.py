"""The pool's manifest: its schema, the migrations from older ones, and what to make of a damaged one.

    {"schema_version": 1,
     "backbone": {"name", "source", "fingerprint", "num_features", "preprocessing"},
     "records": [{"id": "task-000", ...}, ...]}

Each record is read by itself: one that is broken is kept as it is, and is an error only for who asks for it.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Container, Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from cl_adapters._forms import SHA, clipped, shown
from cl_adapters._io import check_schema, parse_json, sync_folder, write_bytes
from cl_adapters.backbones.card import BackboneCard
from cl_adapters.config import build, to_plain
from cl_adapters.errors import ConfigError, PoolError, UnknownName
from cl_adapters.pool.blobs import read_file
from cl_adapters.pool.record import Record, adapter_file, knowledge_file, record_from_plain, record_to_plain

MANIFEST = "manifest.json"
SCHEMA = 1

Migration = Callable[[dict[str, Any]], dict[str, Any]]
migrations: dict[int, Migration] = {}
"""From each older schema version to the next; a step gets the plain content and returns the new content."""


def migration(version: int) -> Callable[[Migration], Migration]:
    """Decorator that enters the step from schema ``version`` to ``version + 1``."""

    def enter(step: Migration) -> Migration:
        assert version not in migrations
        migrations[version] = step
        return step

    return enter


@migration(0)
def _with_lineage(content: dict[str, Any]) -> dict[str, Any]:
    """Schema 1 added tags, parents, merge and compression: before it nothing was tagged, merged or compressed."""
    new: dict[str, Any] = {"tags": [], "parents": [], "merge": None, "compression": None}
    records = content.get("records")
    if isinstance(records, list):
        records = [new | record if isinstance(record, dict) else record for record in records]
    return content | {"records": records}


@dataclass(frozen=True)
class Broken:
    """A record that cannot be used.

    Attributes:
        id: what it calls itself, or its place in the manifest; for messages, and to remove it.
        reason: what is wrong with it.
        plain: what stands in the file; written back as it is.
    """

    id: str
    reason: str
    plain: Any

    @property
    def files(self) -> tuple[str, ...]:
        """Paths of the files that it seems to name; they are kept for a repair."""
        plain = self.plain if isinstance(self.plain, dict) else {}
        named = ((adapter_file, plain.get("adapter_sha")), (knowledge_file, plain.get("knowledge_sha")))
        return tuple(place(sha) for place, sha in named if isinstance(sha, str) and SHA.fullmatch(sha))


Entry = Record | Broken


@dataclass(frozen=True)
class Manifest:
    """The content of a manifest, in the current schema.

    Attributes:
        backbone: what the adapters belong to.
        entries: records in the order in which they were added, broken ones too.
        schema_version: of the file that was read; every write makes it the current one.
    """

    backbone: BackboneCard
    entries: tuple[Entry, ...] = ()
    schema_version: int = SCHEMA

    @cached_property
    def records(self) -> tuple[Record, ...]:
        """The records that can be used."""
        return tuple(entry for entry in self.entries if isinstance(entry, Record))

    @cached_property
    def broken(self) -> tuple[Broken, ...]:
        """The records that cannot."""
        return tuple(entry for entry in self.entries if isinstance(entry, Broken))

    @cached_property
    def by_id(self) -> dict[str, Entry]:
        """Entries by id."""
        return {entry.id: entry for entry in self.entries}

    @cached_property
    def files(self) -> frozenset[str]:
        """Paths below the pool of every file that an entry names."""
        return frozenset(file for entry in self.entries for file in entry.files)

    def get(self, id: str) -> Record:
        """The record of that id.

        Raises:
            UnknownName: there is none; names the nearest.
            PoolError: it is broken.
        """
        entry = self.by_id.get(id)
        if entry is None:
            raise UnknownName.of("adapter", id, self.by_id)
        if isinstance(entry, Broken):
            raise PoolError(f"adapter {shown(id)} cannot be used: its record is broken: {entry.reason}")
        return entry

    def plus(self, records: Iterable[Record]) -> Manifest:
        """This manifest with more records."""
        return Manifest(self.backbone, (*self.entries, *records))

    def mapped(self, change: Callable[[Record], Record]) -> Manifest:
        """This manifest with every usable record replaced by what ``change`` returns."""
        entries = (change(entry) if isinstance(entry, Record) else entry for entry in self.entries)
        return Manifest(self.backbone, tuple(entries))


def check_free(id: str, taken: Container[str]) -> None:
    """Check that an id can be given to a new record.

    Raises:
        PoolError: it is taken.
    """
    if id in taken:
        raise PoolError(f"there is an adapter {id!r} already: choose another id, or replace or remove that one")


def load_manifest(pool: Path) -> bytes:
    """The manifest's bytes, for :func:`parse_manifest`.

    Raises:
        PoolError: there is none, or it is not a file of the pool's own.
    """
    if not pool.is_dir():
        raise PoolError(f"no pool at {pool}: the folder does not exist")
    if not (pool / MANIFEST).exists():
        raise PoolError(f"{pool} is not a pool: it has no {MANIFEST}")
    return read_file(pool, MANIFEST)


def parse_manifest(content: bytes, where: Path) -> Manifest:
    """Understand the JSON of a manifest, of this or an older schema; ``where``: the file, for messages.

    Raises:
        PoolError: not strict JSON, of a newer schema, or without a backbone or a list of records.
    """
    plain = _migrated(plain_manifest(content, where), where)
    version, card, records = plain["schema_version"], plain.get("backbone"), plain.get("records")
    if not isinstance(card, dict) or not isinstance(records, list):
        raise PoolError(f"{where} is damaged: it has no backbone or no list of records; restore a copy")
    try:
        backbone = build(BackboneCard, card, "backbone")
        backbone.check_form(PoolError)
    except (ConfigError, PoolError) as error:
        raise PoolError(f"{where} is damaged: {clipped(str(error), 300)}; restore a copy") from error
    entries = [_entry(record, place) for place, record in enumerate(records)]
    twice = {id for id, number in Counter(entry.id for entry in entries).items() if number > 1}
    for place, entry in enumerate(entries):
        if entry.id in twice:
            entries[place] = Broken(entry.id, f"{shown(entry.id)} stands in the manifest twice", records[place])
    return Manifest(backbone, tuple(entries), version)


def plain_manifest(content: bytes, where: Path) -> dict[str, Any]:
    """A manifest's JSON as it stands there, of this schema or an older one.

    Raises:
        PoolError: not strict JSON, or of a newer schema.
    """
    try:
        # numbers that JSON does not know stay texts: they break the record that has them, not the pool
        plain = parse_json(content, parse_constant=str, parse_float=_finite, parse_int=_short)
    except ValueError as error:
        raise PoolError(f"{where} cannot be read as JSON: {clipped(str(error), 200)}; restore a copy") from error
    return check_schema(plain, SCHEMA, where, PoolError)


def write_manifest(pool: Path, manifest: Manifest) -> bytes:
    """Write the manifest in the current schema, in one step; returns its bytes.

    Raises:
        PoolError: the backbone's card has values of the wrong form.
        StorageError: it cannot be written; the old one still stands.
    """
    manifest.backbone.check_form(PoolError)
    plain = manifest_to_plain(manifest)
    content = (json.dumps(plain, indent=1, allow_nan=False) + "\n").encode()
    write_bytes(pool / MANIFEST, content)
    sync_folder(pool)
    return content


def manifest_to_plain(manifest: Manifest) -> dict[str, Any]:
    """The content of a manifest as JSON-ready values of the current schema."""
    return {
        "schema_version": SCHEMA,
        "backbone": to_plain(manifest.backbone),
        "records": [record_to_plain(entry) if isinstance(entry, Record) else entry.plain for entry in manifest.entries],
    }


def _migrated(plain: dict[str, Any], where: Path) -> dict[str, Any]:
    written = plain["schema_version"]
    for version in range(written, SCHEMA):
        plain = migrations[version](plain)
    return plain | {"schema_version": written}


def _entry(plain: Any, place: int) -> Entry:
    try:
        return record_from_plain(plain)
    except PoolError as error:
        named = plain.get("id") if isinstance(plain, dict) else None
        id = named if isinstance(named, str) and named.isprintable() and len(named) <= 80 else f"record {place}"
        return Broken(id, str(error), plain)


def _finite(text: str) -> float | str:
    value = float(text)
    return value if math.isfinite(value) else text


def _short(text: str) -> int | str:
    return int(text) if len(text) < 100 else text
