"""Every strategy's numbers to the last bit, to see that a change of the code has not changed them.

    python tests/golden/same_numbers.py --out before.json
    python tests/golden/same_numbers.py --out after.json --against before.json

Runs every registered strategy on ``digits`` and the longer runs of ``MORE``, seed 0, each with its preset, on one
thread. Numbers repeat on the same processor with the same packages only, so both files are made on one machine.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from cl_adapters._io import write_json
from cl_adapters.benchmarks.run.experiment import resolve
from cl_adapters.benchmarks.run.runner import run
from cl_adapters.benchmarks.run.session import complete_tasks
from cl_adapters.strategies.base import strategies

MORE = (("mos", "glyphs", 5), ("sema", "glyphs", 5))
"""Strategy, benchmark, number of tasks."""


def jobs() -> dict[str, tuple[str, str, dict[str, Any]]]:
    """Name of each run to strategy, benchmark and settings."""
    found: dict[str, tuple[str, str, dict[str, Any]]] = {
        f"{name}-digits": (name, "digits", {}) for name in strategies.names()
    }
    return found | {f"{name}-{data}": (name, data, {"benchmark.tasks": tasks}) for name, data, tasks in MORE}


def measured(strategy: str, benchmark: str, settings: dict[str, Any]) -> dict[str, Any]:
    """One run, with all floats as hexadecimal text."""
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "run"
        results = run(resolve(strategy, benchmark, seed=0, settings=settings), out)
        return {
            "accuracy_matrix": [[hexed(cell) for cell in row] for row in results.accuracy_matrix],
            "adapters": list(results.adapters or ()),
            "passes": [hexed(value) for value in results.backbone_passes_per_image.per_evaluation],
            "adapter_sha": tensors_sha(complete_tasks(out)[-1] / "model"),
        }


def hexed(value: float | None) -> str | None:
    """All bits of a number as text."""
    return None if value is None else float(value).hex()


def tensors_sha(model: Path) -> str:
    """SHA-256 over the names and bytes of all tensor files of a saved model: adapters, heads, statistics, parts."""
    digest = hashlib.sha256()
    for path in sorted(model.rglob("*.safetensors")):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(model).as_posix()} {len(content)}\n".encode() + content)
    return digest.hexdigest()


def differing(found: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """RUN.FIELD for each that is not the same in both, and RUN for each that is only in one."""
    lines = [f"{name}: only in one of the two" for name in sorted(found.keys() ^ other.keys())]
    return lines + [
        f"{name}.{field}"
        for name in sorted(found.keys() & other.keys())
        for field in sorted(found[name].keys() | other[name].keys())
        if found[name].get(field) != other[name].get(field)
    ]


def command(
    out: Annotated[Path | None, typer.Option(help="File to write; default: print.")] = None,
    against: Annotated[Path | None, typer.Option(help="File of an earlier call, to compare with bit for bit.")] = None,
    only: Annotated[
        list[str] | None, typer.Option(help="Runs such as mos-digits; default all. May be repeated.")
    ] = None,
) -> None:
    """Run everything, write the numbers, and compare them with earlier ones."""
    torch.set_num_threads(1)
    known = jobs()
    unknown = sorted(set(only or ()) - set(known))
    if unknown:
        raise typer.BadParameter(f"no run {unknown[0]!r}; there are {', '.join(known)}", param_hint="--only")
    earlier = None if against is None else json.loads(against.read_text(encoding="utf-8"))
    found: dict[str, Any] = {}
    for name in only or known:
        began = time.perf_counter()
        found[name] = measured(*known[name])
        typer.echo(f"{name}: {time.perf_counter() - began:.1f} s", err=True)
        if out is not None:
            write_json(out, found)
    if out is None:
        typer.echo(json.dumps(found, indent=1))
    if earlier is None:
        return
    lines = differing(found, {name: row for name, row in earlier.items() if not only or name in only})
    for line in lines:
        typer.echo(f"differs: {line}", err=True)
    if lines:
        raise typer.Exit(1)
    typer.echo(f"the same as {against}: {len(found)} runs", err=True)


if __name__ == "__main__":
    typer.run(command)
