"""What a change of a pool does to its accuracy: the test samples of a benchmark, answered before and after."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from torch.utils.data import DataLoader

from cl_adapters.benchmarks.base import BenchmarkData, benchmarks
from cl_adapters.benchmarks.spec import parse_benchmark
from cl_adapters.benchmarks.streams.datasets import as_dataset, task_indices
from cl_adapters.benchmarks.streams.prepared import prepare
from cl_adapters.errors import ClAdaptersError, ConfigError, PoolError
from cl_adapters.model.facade import AdapterModel
from cl_adapters.parts.keys import CLASS_KEYS
from cl_adapters.pool import AdapterPool, Record
from cl_adapters.predictors.base import predictors
from cl_adapters.predictors.nearest_key import NearestKey

BATCH = 128


@dataclass(frozen=True, kw_only=True)
class BenchmarkItems:
    """Test samples of some classes.

    Attributes:
        data: the benchmark.
        indices: positions among its test samples, by class.
    """

    data: BenchmarkData
    indices: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Change:
    """Accuracy before and after a change.

    Attributes:
        before: percent right.
        after: percent right.
        samples: how many were asked.
        benchmark: where they are from.
        predictor: registered name of the inference rule of both.
    """

    before: float
    after: float
    samples: int
    benchmark: str
    predictor: str


def items_for(records: Sequence[Record], benchmark: str | None, seed: int, limit: int | None) -> BenchmarkItems:
    """The test samples of the records' classes.

    Args:
        records: whose classes are asked for.
        benchmark: "NAME" or "NAME:ARGUMENT"; None: the one that all records name.
        seed: of the benchmark.
        limit: samples per class; None: all.

    Raises:
        UnknownName, ConfigError: no such benchmark; the records name none, or several; or its classes are others.
        DataError: its data cannot be had here.
    """
    if benchmark is None:
        named = {record.benchmark for record in records if record.classes}
        if len(named) != 1 or None in named:
            raise ConfigError("the adapters name no common benchmark")
        (benchmark,) = (name for name in named if name is not None)
    data = parse_benchmark(benchmark, {})[1].load(seed)
    labels = {known.label: known.name for record in records for known in record.classes}
    for label, name in labels.items():
        there = data.classes[label] if 0 <= label < len(data.classes) else None
        if there is None or name not in (None, there):
            raise ConfigError(f"class {label} is {name!r} in the pool, but {there!r} in benchmark {benchmark!r}")
    return items_of(data, list(labels), limit)


def items_of(data: BenchmarkData, labels: Iterable[int], limit: int | None) -> BenchmarkItems:
    """The test samples of some classes.

    Args:
        data: the benchmark.
        labels: of the classes.
        limit: samples per class; None: all.
    """
    indices = [index for label in labels for index in islice(task_indices(data.test, [label]), limit)]
    return BenchmarkItems(data=data, indices=tuple(indices))


def change(
    before: tuple[AdapterPool, Sequence[str] | None],
    after: tuple[AdapterPool, Sequence[str] | None],
    items: BenchmarkItems,
) -> Change:
    """Answer the same samples by some records of one pool and by some of another.

    Both models predict by the pool's own rule; where one of them cannot, because its rule needs an adapter that is not
    among the records, both take the adapter of the nearest key.

    Args:
        before: pool, and ids of the records; None: all.
        after: the same.
        items: what to ask.

    Raises:
        PoolError: the records make no model.
        ConfigError: the backbone takes no such samples.
    """
    models = _models(before, after)
    right = [_right(model, items) for model in models]
    shares = [100.0 * count / max(1, len(items.indices)) for count in right]
    return Change(
        before=shares[0],
        after=shares[1],
        samples=len(items.indices),
        benchmark=items.data.name,
        predictor=predictors.name_of(models[0].predictor),
    )


def benchmark_text(name: str, config: object) -> str:
    """A benchmark as ``--benchmark`` takes it, but without the place of a folder of the user's.

    Args:
        name: registered.
        config: its settings.
    """
    argument = benchmarks.get(name).argument
    if argument is None or not hasattr(type(config), argument):  # no default: a path of the user's
        return name
    value = getattr(config, argument)
    return name if value == getattr(type(config), argument) else f"{name}:{value}"


def _models(*pools: tuple[AdapterPool, Sequence[str] | None]) -> list[AdapterModel]:
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
    data, _, transform = prepare(items.data, model.backbone)
    dataset = as_dataset(data.test, items.indices, transform)
    labels = torch.tensor(model.classes)
    found = 0
    for x, y in DataLoader(dataset, batch_size=BATCH):
        found += int((labels[model.answer(x).logits.argmax(1).cpu()] == y).sum())
    return found
