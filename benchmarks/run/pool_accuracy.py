"""Changing a pool, and what that does to its accuracy: test samples of a benchmark, answered before and after."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from cl_adapters.benchmarks.base import BenchmarkData, benchmarks
from cl_adapters.benchmarks.spec import parse_benchmark
from cl_adapters.benchmarks.streams.datasets import as_dataset, task_indices
from cl_adapters.benchmarks.streams.prepared import prepare
from cl_adapters.codecs import Codec
from cl_adapters.errors import ClAdaptersError, ConfigError, PoolError
from cl_adapters.model.facade import AdapterModel
from cl_adapters.parts.keys import CLASS_KEYS
from cl_adapters.pool import AdapterPool, Record
from cl_adapters.pool.compression import Compressed, compress_records, compressed_copy
from cl_adapters.pool.copies import temporary_copy
from cl_adapters.pool.merging import MergedRecord, merge_records
from cl_adapters.predictors.base import predictors
from cl_adapters.predictors.nearest_key import NearestKey

BATCH = 128


@dataclass(frozen=True, kw_only=True)
class Samples:
    """Which test samples are to show what a change does.

    Attributes:
        benchmark: "NAME" or "NAME:ARGUMENT"; None: the one that the adapters name, if they do.
        seed: of the benchmark.
        limit: per class; None: all.
    """

    benchmark: str | None = None
    seed: int = 0
    limit: int | None = None


@dataclass(frozen=True, kw_only=True)
class BenchmarkItems:
    """Test samples of some classes of a benchmark: their positions among all of it, by class."""

    data: BenchmarkData
    indices: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Change:
    """Accuracy before and after a change.

    Attributes:
        before, after: percent right.
        samples: how many were asked.
        predictor: registered name, of both.
    """

    before: float
    after: float
    samples: int
    benchmark: str
    predictor: str


def merge_measured(
    pool: AdapterPool,
    ids: Sequence[str],
    method: str,
    options: Mapping[str, Any],
    *,
    id: str,
    samples: Samples | None,
    dry_run: bool = False,
    **chosen: Any,
) -> tuple[MergedRecord, Change | str | None]:
    """Merge adapters as :func:`cl_adapters.pool.merging.merge_records` does, with the accuracy of parents and child.

    The child is made and asked in a copy first. The pool gets it with its accuracy among the metrics, unless
    ``dry_run``. ``chosen``: further arguments of ``merge_records``.

    Returns:
        What was made, and the accuracy, why it is not known, or None where there are no ``samples`` to ask.
    """
    with temporary_copy(pool) as scratch:
        made = merge_records(pool, ids, method, options, id=id, **chosen, into=scratch)
        measured = _measured((pool, ids), (scratch, [id]), samples)
    if not dry_run:
        metrics = {"accuracy": measured.after} if isinstance(measured, Change) else None
        written = merge_records(pool, ids, method, options, id=id, **chosen, metrics=metrics)
        made = replace(made, record=written.record)
    return made, measured


def compress_measured(
    pool: AdapterPool,
    codec: Codec,
    ids: Sequence[str] | None,
    *,
    samples: Samples | None,
    to: Path | None = None,
    dry_run: bool = False,
) -> tuple[tuple[Compressed, ...], Change | str | None]:
    """Store adapters in fewer bits, with the accuracy before and after, which a copy shows first.

    Asked is the model of all records, where no class belongs to two of them; else that of the compressed ones. The pool
    is changed in place, unless ``to`` is the new folder of a pool of these adapters.

    Returns:
        What becomes of each, and the accuracy as in :func:`merge_measured`.
    """
    chosen = [pool.get(id).id for id in ids] if ids else list(pool.ids)
    labels = [label for record in pool.records for label in record.labels]
    model = list(pool.ids) if len(labels) == len(set(labels)) else chosen
    with temporary_copy(pool, list(dict.fromkeys([*model, *chosen]))) as scratch:
        done = compress_records(scratch, codec, ids)
        measured = _measured((pool, model), (scratch, model), samples)
    if to is not None and not dry_run:
        compressed_copy(pool, to, codec, ids)
    elif not dry_run:
        compress_records(pool, codec, ids)
    return done, measured


def items_for(records: Sequence[Record], samples: Samples) -> BenchmarkItems:
    """The test samples of the records' classes.

    Raises:
        UnknownName, ConfigError: no such benchmark; the records name none, or several; or its classes are others.
        DataError: its data cannot be had here.
    """
    benchmark = samples.benchmark
    if benchmark is None:
        named = {record.benchmark for record in records if record.classes}
        if len(named) != 1 or None in named:
            raise ConfigError("the adapters name no common benchmark")
        (benchmark,) = (name for name in named if name is not None)
    data = parse_benchmark(benchmark, {})[1].load(samples.seed)
    labels = {known.label: known.name for record in records for known in record.classes}
    for label, name in labels.items():
        there = data.classes[label] if 0 <= label < len(data.classes) else None
        if there is None or name not in (None, there):
            raise ConfigError(f"class {label} is {name!r} in the pool, but {there!r} in benchmark {benchmark!r}")
    return items_of(data, labels, samples.limit)


def items_of(data: BenchmarkData, labels: Iterable[int], limit: int | None) -> BenchmarkItems:
    """The test samples of some classes, at most ``limit`` of each."""
    indices = [index for label in labels for index in islice(task_indices(data.test, [label]), limit)]
    return BenchmarkItems(data=data, indices=tuple(indices))


def benchmark_text(name: str, config: object) -> str:
    """A benchmark as ``--benchmark`` takes it, but without the place of a folder of the user's."""
    argument = benchmarks.get(name).argument
    if argument is None or not hasattr(type(config), argument):  # no default: a path of the user's
        return name
    value = getattr(config, argument)
    return name if value == getattr(type(config), argument) else f"{name}:{value}"


def batches(model: AdapterModel, items: BenchmarkItems) -> Iterator[tuple[Tensor, Tensor]]:
    """Samples as the model's backbone takes them, and their labels [B].

    Raises:
        ConfigError: the backbone takes no such samples.
    """
    data, _, transform = prepare(items.data, model.backbone)
    if items.indices:
        yield from DataLoader(as_dataset(data.test, items.indices, transform), batch_size=BATCH)


def _measured(
    before: tuple[AdapterPool, Sequence[str]], after: tuple[AdapterPool, Sequence[str]], samples: Samples | None
) -> Change | str | None:
    """The accuracy of some records of two pools, or why it is not known. What is asked for by name has to work."""
    if samples is None:
        return None
    pool, ids = before
    try:
        items = items_for([pool.get(id) for id in ids], samples)
        models = _models(before, after)
        then, now = (100.0 * _right(model, items) / len(items.indices) for model in models)
    except ClAdaptersError as error:
        if samples.benchmark is not None:
            raise
        return f"{error}; give --benchmark"
    return Change(
        before=then,
        after=now,
        samples=len(items.indices),
        benchmark=items.data.name,
        predictor=predictors.name_of(models[0].predictor),
    )


def _models(*pools: tuple[AdapterPool, Sequence[str]]) -> list[AdapterModel]:
    """Models that predict by the pools' own rule, or all by the nearest key.

    The latter where one of them cannot do otherwise, because its rule needs an adapter that is not among its records.
    """
    try:
        return [AdapterModel.from_pool(pool, ids) for pool, ids in pools]
    except PoolError:
        models = [AdapterModel.from_pool(pool, ids, predictor=NearestKey()) for pool, ids in pools]
        if not all(CLASS_KEYS in model.parts for model in models):
            raise
        return models


def _right(model: AdapterModel, items: BenchmarkItems) -> int:
    if not items.indices:
        raise ClAdaptersError("there are no test samples to ask")
    labels = torch.tensor(model.classes)
    return sum(int((labels[model.answer(x).logits.argmax(1).cpu()] == y).sum()) for x, y in batches(model, items))
