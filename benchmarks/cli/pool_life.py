"""The `cl-adapters pool` commands that make, merge and compress adapters; they need the backbone."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from cl_adapters.benchmarks.cli._console import console, print_json, say, shown
from cl_adapters.benchmarks.cli.options import BenchmarkSeed, Json, Limit, Pool, Weights, parse_settings
from cl_adapters.benchmarks.cli.pool import opened, plain_record
from cl_adapters.errors import ConfigError

if TYPE_CHECKING:
    from cl_adapters.benchmarks.run.pool_accuracy import Change
    from cl_adapters.pool import Record

Settings = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Option of the method or codec; may be repeated.")
]
Benchmark = Annotated[
    str | None, typer.Option(help="Measures the accuracy before and after; default the one that the adapters name.")
]
Accuracy = Annotated[bool, typer.Option("--accuracy/--no-accuracy", help="Measure it.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print what would come out, write nothing.")]
NOT_WANTED = "--no-accuracy"


def create_command(
    pool: Annotated[Path, typer.Argument(help="New folder.")],
    run: Annotated[Path, typer.Option("--run", help="Folder of a run.")],
    task: Annotated[
        int | None, typer.Option(help="The model after this task, from 0; default the last.", min=0)
    ] = None,
    tag: Annotated[list[str] | None, typer.Option(help="Of every adapter; may be repeated.")] = None,
    compress: Annotated[str | None, typer.Option(metavar="CODEC", help="See `cl-adapters list codecs`.")] = None,
    weights: Weights = None,
) -> None:
    """Make a pool of the model of a run, one record per adapter."""
    from cl_adapters.benchmarks.run.pool_of_run import pool_of_run

    made = pool_of_run(pool, run, task=task, tags=tag or (), compression=compress, weights=weights)
    say(f"wrote {pool}: {len(made)} adapters of backbone {made.backbone_card.name}")
    if not any("keys" in made.knowledge(record.id) for record in made.records):
        say("without keys, which the index needs: run with --keys prototypes (or centroids, features)")


def merge_command(
    pool: Pool,
    ids: Annotated[list[str], typer.Argument(help="Ids of the adapters to merge.")],
    new: Annotated[str, typer.Option("--id", help="Id of the merged adapter.")],
    method: Annotated[str, typer.Option(help="See `cl-adapters list merges`.")] = "mean",
    settings: Settings = None,
    weights: Annotated[
        str | None, typer.Option(help="For --method weighted: numbers 0.7,0.3, or the name of a recorded metric.")
    ] = None,
    base: Annotated[
        str | None, typer.Option(help="Adapter that all were trained from, where the method takes it.")
    ] = None,
    rank: Annotated[
        int | None, typer.Option(help="Of the merged low-rank adapter; default the largest.", min=1)
    ] = None,
    tag: Annotated[list[str] | None, typer.Option(help="Of the merged adapter; may be repeated.")] = None,
    compress: Annotated[str | None, typer.Option(metavar="CODEC", help="See `cl-adapters list codecs`.")] = None,
    benchmark: Benchmark = None,
    seed: BenchmarkSeed = 0,
    limit: Limit = None,
    accuracy: Accuracy = True,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Merge adapters into a new one; the old ones stay."""
    from cl_adapters.benchmarks.run.pool_accuracy import Samples, merge_measured

    store = opened(pool)
    parents = [store.get(id) for id in ids]
    if new in store:
        raise ConfigError(f"{pool} has an adapter {new!r} already; choose another --id")
    options = parse_settings(settings or ())
    if weights is not None:
        options["metrics"] = _weights(weights, parents)
    done, measured = merge_measured(
        store,
        ids,
        method,
        options,
        id=new,
        base=base,
        rank=rank,
        tags=tag or (),
        compression=compress,
        samples=Samples(benchmark=benchmark, seed=seed, limit=limit) if accuracy else None,
        dry_run=dry_run,
    )
    if as_json:
        result = {"written": not dry_run, "record": plain_record(done.record), "notes": done.notes}
        print_json(result | {"report": done.report.to_plain(), "accuracy": _plain_accuracy(measured)})
        return
    report = done.report
    how = (
        f"exactly, as changes of weight matrices, to rank {report.rank}"
        if report.space == "delta"
        else "number by number"
    )
    say(f"{'would merge' if dry_run else 'merged'} {', '.join(ids)} into {new} by {method}: {how}")
    if report.space == "delta":
        say(f"truncation lost {report.error:.2e} of the merged change's norm")
    for note in done.notes:
        say(note)
    say(_accuracy_line(measured))
    if not dry_run:
        say(f"{', '.join(ids)} stay; a model takes either them or {new}: remove them (pool rm), or choose by ids=")


def compress_command(
    pool: Pool,
    codec: Annotated[str, typer.Option(help="See `cl-adapters list codecs`.")],
    ids: Annotated[list[str] | None, typer.Argument(help="Ids of adapters; default all.")] = None,
    settings: Settings = None,
    to: Annotated[Path | None, typer.Option(help="Write a new pool of these adapters, leave this one.")] = None,
    benchmark: Benchmark = None,
    seed: BenchmarkSeed = 0,
    limit: Limit = None,
    accuracy: Accuracy = True,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Store adapters in fewer bits; prints what that costs."""
    from cl_adapters.benchmarks.run.pool_accuracy import Samples, compress_measured
    from cl_adapters.codecs import codec_from

    store = opened(pool)
    made = codec_from({"type": codec} | parse_settings(settings or ()))
    samples = Samples(benchmark=benchmark, seed=seed, limit=limit) if accuracy else None
    done, measured = compress_measured(store, made, ids or None, samples=samples, to=to, dry_run=dry_run)
    if as_json:
        rows = [dataclasses.asdict(one) for one in done]
        print_json({"written": not dry_run, "adapters": rows, "accuracy": _plain_accuracy(measured)})
        return
    table = Table("id", "stored before", "after", "ratio", "relative error")
    for one in done:
        ratio = f"{one.before / max(1, one.after):.1f}"
        table.add_row(shown(one.id), f"{one.before:,}", f"{one.after:,}", ratio, f"{one.error:.2e}")
    console.print(table)
    before, after = sum(one.before for one in done), sum(one.after for one in done)
    where = "nothing written" if dry_run else f"written to {to or pool}"
    say(f"{len(done)} adapters as {codec}: {before:,} -> {after:,} bytes; {where}")
    say(_accuracy_line(measured))


def _weights(text: str, parents: Sequence[Record]) -> list[float]:
    """Numbers as written, or the parents' metric of that name."""
    from cl_adapters.pool.merging import recorded_metric

    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        pass
    try:
        return recorded_metric(parents, text)
    except ConfigError as error:
        raise ConfigError(f"--weights takes numbers (0.7,0.3) or the name of a metric that all have; {error}") from None


def _accuracy_line(measured: Change | str | None) -> str:
    if isinstance(measured, str | None):
        return f"accuracy not measured: {measured or NOT_WANTED}"
    return (
        f"accuracy {measured.before:.2f} % -> {measured.after:.2f} % ({measured.after - measured.before:+.2f}) on "
        f"{measured.samples} test samples of {measured.benchmark}, predictor {measured.predictor}"
    )


def _plain_accuracy(measured: Change | str | None) -> dict[str, Any]:
    if isinstance(measured, str | None):
        return {"not_measured": measured or NOT_WANTED}
    return dataclasses.asdict(measured)
