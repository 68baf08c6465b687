"""The `cl-adapters pool` commands: look at a pool of adapters and change it, without loading a backbone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    from cl_adapters.pool import AdapterPool, Record

app = typer.Typer(no_args_is_help=True, help="Adapters on disk: list, check, change, copy, export, import.")
console = Console()

Pool = Annotated[Path, typer.Argument(help="Folder of the pool.")]
Id = Annotated[str, typer.Argument(help="An adapter's id; see `cl-adapters pool ls`.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.command("ls")
def ls_command(
    pool: Pool,
    tag: Annotated[list[str] | None, typer.Option(help="Only adapters with this tag; may be repeated.")] = None,
    label: Annotated[list[int] | None, typer.Option(help="Only adapters that know one of these classes.")] = None,
    kind: Annotated[str | None, typer.Option("--type", help="Only adapters of this type.")] = None,
    as_json: Json = False,
) -> None:
    """List the adapters, oldest first."""
    opened = _open(pool)
    records = opened.list(tags=tag or (), classes=label or (), type=kind)
    if as_json:
        _print_json([_plain(record) for record in records])
        return
    table = Table("id", "type", "classes", "task", "parameters", "stored", "tags")
    for record in records:
        stored = sum((pool / file).stat().st_size for file in record.files if (pool / file).is_file())
        row = (
            record.id,
            _type(record),
            _classes(record, 6),
            "" if record.task is None else str(record.task),
            f"{record.num_parameters:,}",
            f"{stored / 1024:,.0f} KiB" + (f" {record.compression}" if record.compression else ""),
            ", ".join(record.tags),
        )
        table.add_row(*map(escape, row))
    console.print(table)
    card = opened.backbone_card
    _say(f"{len(records)} of {len(opened)} adapters of backbone {card.name} ({card.fingerprint[:16]})")
    for broken in opened.broken:
        _say(f"broken: {broken.id}: {broken.reason}")


@app.command("show")
def show_command(pool: Pool, id: Id, as_json: Json = False) -> None:
    """Show everything that is known of one adapter."""
    opened = _open(pool)
    record = opened.get(id)
    if as_json:
        _print_json(_plain(record))
        return
    plain = _plain(record) | {"type": _type(record), "classes": _classes(record, 10_000)}
    table = Table(show_header=False)
    for key, value in plain.items():
        if value not in (None, [], {}):
            table.add_row(key, escape(value if isinstance(value, str) else json.dumps(value)))
    for file in record.files:
        size = (pool / file).stat().st_size if (pool / file).is_file() else None
        table.add_row("file", f"{file}: " + ("missing" if size is None else f"{size:,} bytes"))
    console.print(table)


@app.command("verify")
def verify_command(pool: Pool, as_json: Json = False) -> None:
    """Check every record and file; exit code 1 where something is wrong."""
    found = _open(pool).verify()
    if as_json:
        _print_json({"ok": found.ok, "problems": found.problems, "orphans": found.orphans})
    else:
        for problem in found.problems:
            _say(f"wrong: {problem}")
        for orphan in found.orphans:
            _say(f"orphan: {orphan}")
        hint = f"; `cl-adapters pool gc {pool}` deletes them" if found.orphans else ""
        _say(f"{len(found.problems)} problems, {len(found.orphans)} orphans{hint}")
    raise typer.Exit(0 if found.ok else 1)


@app.command("rm")
def rm_command(
    pool: Pool, ids: Annotated[list[str], typer.Argument(help="Ids of adapters, also broken ones.")]
) -> None:
    """Remove adapters with their files."""
    opened = _open(pool)
    for id in ids:
        opened.remove(id)
        _say(f"removed {id}")


@app.command("gc")
def gc_command(pool: Pool) -> None:
    """Delete the files that no adapter has; they are left when a writer is killed."""
    deleted = _open(pool).gc()
    for file in deleted:
        _say(f"deleted {file}")
    _say(f"{len(deleted)} files deleted")


@app.command("tag")
def tag_command(
    pool: Pool,
    id: Id,
    add: Annotated[list[str] | None, typer.Option("--add", help="Tag to add; may be repeated.")] = None,
    remove: Annotated[list[str] | None, typer.Option("--remove", help="Tag to remove; may be repeated.")] = None,
) -> None:
    """Add tags to an adapter, or remove some."""
    record = _open(pool).tag(id, add or (), remove or ())
    _say(f"{id}: {', '.join(record.tags) or 'no tags'}")


@app.command("rename")
def rename_command(pool: Pool, old: Id, new: Annotated[str, typer.Argument(help="The new id.")]) -> None:
    """Give an adapter another id."""
    _open(pool).rename(old, new)
    _say(f"{old} is {new} now")


@app.command("copy")
def copy_command(
    pool: Pool,
    to: Annotated[Path, typer.Argument(help="Another pool of the same backbone.")],
    ids: Annotated[list[str] | None, typer.Argument(help="Ids of adapters; default all.")] = None,
) -> None:
    """Copy adapters into another pool: all of them, or none where one cannot be."""
    added = _open(pool).copy_to(_open(to), ids or None)
    _say(f"copied {len(added)}: {', '.join(record.id for record in added) or 'all are there already'}")


@app.command("export")
def export_command(pool: Pool, id: Id, folder: Annotated[Path, typer.Argument(help="New folder.")]) -> None:
    """Write one adapter as a folder of its own."""
    _open(pool).export_to(folder, id)
    _say(f"wrote {folder}")


@app.command("import")
def import_command(
    pool: Pool,
    folder: Annotated[Path, typer.Argument(help="Folder of `cl-adapters pool export`.")],
    id: Annotated[str | None, typer.Option(help="Another id than the folder's.")] = None,
) -> None:
    """Add an adapter from a folder, after checking everything in it."""
    record = _open(pool).import_from(folder, id=id)
    _say(f"added {record.id}: {_classes(record, 6)}")


def _open(pool: Path) -> AdapterPool:
    from cl_adapters.pool import AdapterPool

    return AdapterPool.open(pool)


def _plain(record: Record) -> dict[str, Any]:
    from cl_adapters.pool.record import record_to_plain

    return record_to_plain(record)


def _type(record: Record) -> str:
    return "bare backbone" if record.adapter is None else str(record.adapter["type"])


def _classes(record: Record, most: int) -> str:
    names = [str(known.label) if known.name is None else known.name for known in record.classes]
    more = f", ... ({len(names)})" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _print_json(content: object) -> None:
    typer.echo(json.dumps(content, indent=1))


def _say(text: str) -> None:
    console.print(escape(text), highlight=False, soft_wrap=True)
