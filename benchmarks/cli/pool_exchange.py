"""The `cl-adapters pool` commands that exchange single adapters as folders, ours and those of Hugging Face PEFT."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cl_adapters.benchmarks.cli._console import say
from cl_adapters.benchmarks.cli.options import Pool
from cl_adapters.benchmarks.cli.pool import Id, classes_of, opened, type_of
from cl_adapters.errors import ClAdaptersError, ConfigError, PoolError, UnknownName

if TYPE_CHECKING:
    from cl_adapters.pool import AdapterPool, PoolClass, Record


def export_command(
    pool: Pool,
    id: Id,
    folder: Annotated[Path, typer.Argument(help="New folder.")],
    format: Annotated[
        str, typer.Option(help="pool: everything, for `cl-adapters pool import`; peft: for Hugging Face PEFT.")
    ] = "pool",
) -> None:
    """Write one adapter as a folder of its own."""
    store = opened(pool)
    if format not in FORMATS:
        raise UnknownName.of("format", format, FORMATS)
    say(f"wrote {folder}: {FORMATS[format](store, folder, id)}")


def import_command(
    pool: Pool,
    folder: Annotated[Path, typer.Argument(help="Folder of `cl-adapters pool export`, or of Hugging Face PEFT.")],
    id: Annotated[
        str | None, typer.Option(help="Another id than the folder's; of PEFT's default task-000, ...")
    ] = None,
    classes: Annotated[
        list[str] | None,
        typer.Option("--class", metavar="LABEL[=NAME]", help="Of PEFT's folder: a class it knows; may be repeated."),
    ] = None,
    like: Annotated[
        str | None, typer.Option(help="Of PEFT's folder: give it the type of this adapter, for one model with it.")
    ] = None,
    tag: Annotated[list[str] | None, typer.Option(help="Of PEFT's folder: tag; may be repeated.")] = None,
) -> None:
    """Add an adapter from a folder, after checking everything in it."""
    from cl_adapters.interchange.peft_folder import CONFIG

    store = opened(pool)
    if (folder / CONFIG).is_file():
        record = _import_peft(store, folder, id, classes or (), like, tag or ())
        say(f"added {record.id}: {type_of(record)}")
        say("without keys: the index cannot find it until they are given (AdapterPool.replace)")
        return
    if classes or like or tag:
        raise ConfigError(f"{folder} says itself what it holds: --class, --like and --tag are for folders of PEFT")
    record = store.import_from(folder, id=id)
    say(f"added {record.id}: {classes_of(record, 6)}")


def _export_pool(store: AdapterPool, folder: Path, id: str) -> str:
    store.export_to(folder, id)
    return "the adapter with all that is known of its classes"


def _export_peft(store: AdapterPool, folder: Path, id: str) -> str:
    from cl_adapters.interchange import export_peft
    from cl_adapters.pool.checks import adapter_of

    adapter = adapter_of(store.get(id))
    if adapter is None:
        raise PoolError(f"{id!r} is answered by the bare backbone: there are no tensors to export")
    export_peft(folder, store.tensors(id), adapter, store.backbone)
    return "the tensors; PEFT has no place for classes, heads and keys"


FORMATS: dict[str, Callable[[AdapterPool, Path, str], str]] = {"pool": _export_pool, "peft": _export_peft}


def _import_peft(
    store: AdapterPool, folder: Path, id: str | None, classes: Sequence[str], like: str | None, tags: Sequence[str]
) -> Record:
    from cl_adapters.adapters.lora import LoRA
    from cl_adapters.interchange import import_peft
    from cl_adapters.pool.checks import adapter_of

    wanted = None if like is None else adapter_of(store.get(like))
    if like is not None and not isinstance(wanted, LoRA):
        raise ConfigError(f"--like {like}: PEFT's folders hold adapters of type 'lora', this one is {wanted!r}")
    found = import_peft(folder, store.backbone, wanted if isinstance(wanted, LoRA) else None)
    return store.add(found.tensors, found.adapter, list(map(_class, classes)), id=id, tags=tags)


def _class(text: str) -> PoolClass:
    from cl_adapters.pool import PoolClass

    label, equals, name = text.partition("=")
    try:
        return PoolClass(label=int(label), name=name if equals else None)
    except ValueError as error:
        if isinstance(error, ClAdaptersError):
            raise
        raise ConfigError(f"--class takes LABEL or LABEL=NAME with a whole number as label, got {text!r}") from error
