"""The `cl-adapters pool` commands: look at a pool of adapters and change it, without loading a backbone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from cl_adapters.benchmarks.cli._console import console, print_json, say, shown
from cl_adapters.benchmarks.cli.options import Json, Pool
from cl_adapters.errors import ConfigError

if TYPE_CHECKING:
    from cl_adapters.pool import AdapterPool, Record

Id = Annotated[str, typer.Argument(help="An adapter's id; see `cl-adapters pool ls`.")]


def ls_command(
    pool: Pool,
    tag: Annotated[list[str] | None, typer.Option(help="Only adapters with this tag; may be repeated.")] = None,
    label: Annotated[list[int] | None, typer.Option(help="Only adapters that know one of these classes.")] = None,
    kind: Annotated[str | None, typer.Option("--type", help="Only adapters of this type.")] = None,
    as_json: Json = False,
) -> None:
    """List the adapters, oldest first."""
    store = opened(pool)
    records = store.list(tags=tag or (), classes=label or (), type=kind)
    if as_json:
        print_json([plain_record(record) for record in records])
        return
    table = Table("id", "type", "classes", "task", "parameters", "stored", "tags")
    for record in records:
        stored = sum((pool / file).stat().st_size for file in record.files if (pool / file).is_file())
        row = (
            record.id,
            type_of(record),
            classes_of(record, 6),
            "" if record.task is None else str(record.task),
            f"{record.num_parameters:,}",
            f"{stored / 1024:,.0f} KiB" + (f" {record.compression}" if record.compression else ""),
            ", ".join(record.tags),
        )
        table.add_row(*map(shown, row))
    console.print(table)
    card = store.backbone_card
    say(f"{len(records)} of {len(store)} adapters of backbone {card.name} ({card.fingerprint[:16]})")
    for broken in store.broken:
        say(f"broken: {broken.id}: {broken.reason}")


def show_command(pool: Pool, id: Id, as_json: Json = False) -> None:
    """Show everything that is known of one adapter."""
    store = opened(pool)
    record = store.get(id)
    if as_json:
        print_json(plain_record(record))
        return
    plain = plain_record(record) | {"type": type_of(record), "classes": classes_of(record, 10_000)}
    table = Table(show_header=False)
    for key, value in plain.items():
        if value not in (None, [], {}):
            table.add_row(shown(key), shown(value if isinstance(value, str) else json.dumps(value)))
    for file in record.files:
        size = (pool / file).stat().st_size if (pool / file).is_file() else None
        table.add_row("file", shown(f"{file}: " + ("missing" if size is None else f"{size:,} bytes")))
    console.print(table)


def verify_command(pool: Pool, as_json: Json = False) -> None:
    """Check every record and file; exit code 1 where something is wrong."""
    found = opened(pool).verify()
    if as_json:
        print_json({"ok": found.ok, "problems": found.problems, "orphans": found.orphans})
    else:
        for problem in found.problems:
            say(f"wrong: {problem}")
        for orphan in found.orphans:
            say(f"orphan: {orphan}")
        hint = f"; `cl-adapters pool gc {pool}` deletes them" if found.orphans else ""
        say(f"{len(found.problems)} problems, {len(found.orphans)} orphans{hint}")
    raise typer.Exit(0 if found.ok else 1)


def rm_command(
    pool: Pool, ids: Annotated[list[str], typer.Argument(help="Ids of adapters, also broken ones.")]
) -> None:
    """Remove adapters with their files."""
    store = opened(pool)
    broken = {entry.id for entry in store.broken}
    for id in ids:
        if id not in broken:
            store.get(id)  # before any is removed
    for id in dict.fromkeys(ids):
        store.remove(id)
        say(f"removed {id}")


def forget_command(
    pool: Pool,
    id: Annotated[str | None, typer.Argument(help="An adapter's id.")] = None,
    label: Annotated[int | None, typer.Option(help="Forget one class instead, by its label.")] = None,
    as_json: Json = False,
) -> None:
    """Remove an adapter or a class, also from the pool's indexes, and say what cannot be undone."""
    from cl_adapters.pool.forget import forget

    target = id if label is None else label
    if target is None or (id is not None and label is not None):
        raise ConfigError("name an adapter to forget, or a class by --label")
    done = forget(opened(pool), target)
    if as_json:
        print_json({"removed": done.removed, "cannot_undo": done.cannot_undo})
        return
    for line in done.removed:
        say(f"removed {line}")
    for line in done.cannot_undo:
        say(f"cannot be undone: {line}")


def gc_command(pool: Pool) -> None:
    """Delete the files that no adapter has; they are left when a writer is killed."""
    deleted = opened(pool).gc()
    for file in deleted:
        say(f"deleted {file}")
    say(f"{len(deleted)} files deleted")


def tag_command(
    pool: Pool,
    id: Id,
    add: Annotated[list[str] | None, typer.Option("--add", help="Tag to add; may be repeated.")] = None,
    remove: Annotated[list[str] | None, typer.Option("--remove", help="Tag to remove; may be repeated.")] = None,
) -> None:
    """Add tags to an adapter, or remove some."""
    record = opened(pool).tag(id, add or (), remove or ())
    say(f"{id}: {', '.join(record.tags) or 'no tags'}")


def rename_command(pool: Pool, old: Id, new: Annotated[str, typer.Argument(help="The new id.")]) -> None:
    """Give an adapter another id."""
    opened(pool).rename(old, new)
    say(f"{old} is {new} now")


def copy_command(
    pool: Pool,
    to: Annotated[Path, typer.Argument(help="Another pool of the same backbone.")],
    ids: Annotated[list[str] | None, typer.Argument(help="Ids of adapters; default all.")] = None,
) -> None:
    """Copy adapters into another pool: all of them, or none where one cannot be."""
    added = opened(pool).copy_to(opened(to), ids or None)
    say(f"copied {len(added)}: {', '.join(record.id for record in added) or 'all are there already'}")


def opened(path: Path, weights: Path | None = None) -> AdapterPool:
    """The pool in that folder; ``weights``: where those of its backbone lie now."""
    from cl_adapters.pool import AdapterPool

    pool = AdapterPool.open(path)
    if weights is None:
        return pool
    from cl_adapters.backbones.frozen import FrozenBackbone
    from cl_adapters.backbones.load import moved_source

    if not pool.backbone_card.source:
        raise ConfigError(f"{path} belongs to a wrapped module, which has no --weights; use it from Python")
    return AdapterPool.open(path, backbone=FrozenBackbone.load(**moved_source(pool.backbone_card.source, weights)))


def plain_record(record: Record) -> dict[str, Any]:
    """A record, JSON-ready."""
    from cl_adapters.pool.record import record_to_plain

    return record_to_plain(record)


def type_of(record: Record) -> str:
    """The adapter type's name."""
    return "bare backbone" if record.adapter is None else str(record.adapter["type"])


def classes_of(record: Record, most: int) -> str:
    """The names of the classes, the first so many."""
    names = [str(known.label) if known.name is None else known.name for known in record.classes]
    more = f", ... ({len(names)})" if len(names) > most else ""
    return ", ".join(names[:most]) + more
