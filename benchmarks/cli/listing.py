"""`cl-adapters list`: the plug-ins of each kind, and the presets."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from cl_adapters.benchmarks.cli._console import console, shown
from cl_adapters.errors import UnknownName

if TYPE_CHECKING:
    from cl_adapters.registry import Registry


def list_command(
    kind: Annotated[
        str,
        typer.Argument(
            help="strategies, methods (of instruct), benchmarks, adapters, codecs, indexes, merges, parts, predictors, "
            "presets."
        ),
    ],
) -> None:
    """List the plug-ins of one kind or the presets, with one line each."""
    if kind == "presets":
        from cl_adapters.benchmarks.run.experiment import presets

        table = Table("--strategy", "--preset", "")
        for preset in presets():
            table.add_row(*map(shown, (preset.strategy, preset.name, preset.summary)))
        console.print(table)
        return
    registry = _registry(kind)
    table = Table(kind, "")
    for name in registry.names():
        entry = registry.get(name)
        summary = getattr(entry, "summary", "") or (entry.__doc__ or "").strip().partition("\n")[0]
        table.add_row(shown(name), shown(summary))
    console.print(table)


def _registry(kind: str) -> Registry[Any]:
    from cl_adapters.adapters import adapters
    from cl_adapters.benchmarks.base import benchmarks
    from cl_adapters.codecs import codecs
    from cl_adapters.index import indexes
    from cl_adapters.merge import merges
    from cl_adapters.parts import parts
    from cl_adapters.predictors import predictors
    from cl_adapters.strategies.instruct import instruct_methods

    known: dict[str, Any] = {"adapters": adapters, "benchmarks": benchmarks, "merges": merges}
    known |= {"codecs": codecs, "indexes": indexes, "parts": parts, "predictors": predictors}
    known |= {"methods": instruct_methods}
    if kind == "strategies":
        from cl_adapters.strategies.base import strategies

        return strategies
    if kind not in known:
        raise UnknownName.of("kind of plug-in", kind, [*known, "strategies", "presets"])
    registry: Registry[Any] = known[kind]
    return registry
