"""`cl-adapters index evaluate`: how often an index finds the right adapter, and what it refuses."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from cl_adapters.benchmarks.cli._console import console, print_json, say
from cl_adapters.benchmarks.cli.index import Name, Stale, opened_index
from cl_adapters.benchmarks.cli.options import BenchmarkSeed, Json, Limit, Pool, Weights, parse_settings
from cl_adapters.benchmarks.cli.pool import opened
from cl_adapters.errors import ConfigError, PoolError

if TYPE_CHECKING:
    from cl_adapters.benchmarks.run.pool_accuracy import BenchmarkItems
    from cl_adapters.index.index import AdapterIndex
    from cl_adapters.model.facade import AdapterModel
    from cl_adapters.openset import OpenSet
    from cl_adapters.pool import AdapterPool
    from cl_adapters.predictors.base import Predictor

ROWS = {
    "accuracy": "accuracy",
    "routing": "routing accuracy",
    "coverage": "coverage",
    "false_accept": "false accepts",
}
"""Shares of :class:`cl_adapters.openset.OpenSet`, in words."""


def evaluate_command(
    pool: Pool,
    benchmark: Annotated[
        str | None, typer.Option(help="Where the known classes are asked from; default the one that the adapters name.")
    ] = None,
    unseen: Annotated[
        list[str] | None,
        typer.Option(help="Another benchmark, none of whose classes the pool knows; may be repeated."),
    ] = None,
    predictor: Annotated[
        str | None, typer.Option(help="See `cl-adapters list predictors`; default the pool's own, or nearest_key.")
    ] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Option of the predictor; may be repeated.")
    ] = None,
    seed: BenchmarkSeed = 0,
    limit: Limit = None,
    weights: Weights = None,
    stale: Stale = "error",
    name: Name = "default",
    as_json: Json = False,
) -> None:
    """Answer test samples by the index: accuracy, routing accuracy, coverage, and AUROC against unseen classes.

    Unseen are the classes of the benchmark that the pool does not know, and all of --unseen.
    """
    from cl_adapters.benchmarks.run.pool_accuracy import batches
    from cl_adapters.openset import open_set
    from cl_adapters.predictors.base import predictor_from, predictors

    store = opened(pool, weights)
    index = opened_index(store, name, stale)
    if settings and predictor is None:
        raise ConfigError("--set is for the options of --predictor NAME")
    options = parse_settings(settings or ())
    model = _model(store, index, None if predictor is None else predictor_from({"type": predictor} | options))
    known, unknown = _asked(store, index, benchmark, unseen or (), seed, limit)
    inputs = (x for items in unknown for x, _ in batches(model, items))
    found = open_set(model, batches(model, known), inputs)
    figures = {
        "benchmark": known.data.name,
        "known": len(known.indices),
        "unseen": sum(len(items.indices) for items in unknown),
        "predictor": predictors.name_of(model.predictor),
        "threshold": index.threshold,
    }
    if as_json:
        print_json(figures | dataclasses.asdict(found))
        return
    _show(found)
    say(
        f"{figures['known']:,} test samples of {len(model.classes)} known classes of {figures['benchmark']}, "
        f"{figures['unseen']:,} of classes never seen; predictor {figures['predictor']}"
    )
    if index.threshold is None:
        say("nothing is refused: calibrate by `cl-adapters index build --false-reject 0.05`")


def _show(found: OpenSet) -> None:
    table = Table(show_header=False)
    for key, words in ROWS.items():
        share = getattr(found, key)
        table.add_row(words, "-" if share is None else f"{100 * share:.2f} %")
    table.add_row("AUROC, known against unseen", "-" if found.auroc is None else f"{found.auroc:.4f}")
    table.add_row("passes per known sample", f"{found.passes:.2f}")
    console.print(table)


def _model(store: AdapterPool, index: AdapterIndex, predictor: Predictor | None) -> AdapterModel:
    """Of the index's records; by the nearest key where the pool's own rule cannot run on them."""
    from cl_adapters.model.facade import AdapterModel
    from cl_adapters.predictors.nearest_key import NearestKey

    try:
        return AdapterModel.from_pool(store, index.records, predictor=predictor, index=index)
    except PoolError:
        if predictor is not None:
            raise
        return AdapterModel.from_pool(store, index.records, predictor=NearestKey(), index=index)


def _asked(
    store: AdapterPool, index: AdapterIndex, benchmark: str | None, unseen: Sequence[str], seed: int, limit: int | None
) -> tuple[BenchmarkItems, list[BenchmarkItems]]:
    """Samples of the known classes, and of others."""
    from cl_adapters.benchmarks.run.pool_accuracy import Samples, items_for, items_of
    from cl_adapters.benchmarks.spec import parse_benchmark

    records = [store.get(id) for id in index.records]
    try:
        known = items_for(records, Samples(benchmark=benchmark, seed=seed, limit=limit))
    except ConfigError as error:
        raise error if benchmark is not None else ConfigError(f"{error}; give --benchmark") from error
    labels = {label for record in records for label in record.labels}
    others = [items_of(known.data, [one for one in range(len(known.data.classes)) if one not in labels], limit)]
    for text in unseen:
        data = parse_benchmark(text, {})[1].load(seed)
        if (data.name, data.classes) == (known.data.name, known.data.classes):
            raise ConfigError(f"--unseen {text}: the known classes are of this benchmark; its others are asked anyway")
        others.append(items_of(data, range(len(data.classes)), limit))
    return known, others
