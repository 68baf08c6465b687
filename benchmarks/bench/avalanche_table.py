"""The strategies of this package inside Avalanche: own recipes, plugins, and streams in which classes return.

    python -m cl_adapters.benchmarks.bench.avalanche_table --seeds 0

Accuracy in percent on all test images in the end, mean ± standard deviation over the seeds, which set class order,
initial values, order of the images and augmentation. Trained on the first images of each class of an image benchmark.
"own recipe" is the strategy's preset with fewer epochs, and every column that brings no optimizer has it too. A dash is
what is refused; its note is the message. A number with a note is what was warned of. One thread.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import pairwise
from typing import Annotated, Any

import torch
import typer
from avalanche.benchmarks import benchmark_from_datasets, split_online_stream, with_classes_timeline
from avalanche.benchmarks.utils.utils import concat_datasets
from avalanche.evaluation.metrics import accuracy_metrics
from avalanche.training.plugins import EvaluationPlugin, EWCPlugin, LRSchedulerPlugin, ReplayPlugin
from torch.optim import AdamW
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR

from cl_adapters.backbones.frozen import FrozenBackbone
from cl_adapters.benchmarks.base import BenchmarkData, ImageSet
from cl_adapters.benchmarks.bench._command import command_of, one_of
from cl_adapters.benchmarks.bench.avalanche_strategies import first
from cl_adapters.benchmarks.bench.comparison import Stat, with_deviation
from cl_adapters.benchmarks.bench.table import known_strategies
from cl_adapters.benchmarks.run.experiment import presets
from cl_adapters.benchmarks.spec import parse_benchmark
from cl_adapters.benchmarks.streams.avalanche import to_avalanche
from cl_adapters.benchmarks.streams.prepared import prepare
from cl_adapters.errors import ConfigError, DataError
from cl_adapters.strategies.base import strategies as registry

Stream = tuple[Iterable[Any], Any]
"""Experiences to train on, and those to test on."""
LR = 2e-3
"""Of AdamW."""


# --- recipes and plugins: keywords of a strategy, by the number of epochs -------------------------------------------


def warm_up(epochs: int) -> dict[str, Any]:
    """AdamW with warm-up and label smoothing."""
    return {
        "optimizer": partial(AdamW, lr=LR, weight_decay=0.01),
        "scheduler": partial(LinearLR, start_factor=0.3, total_iters=max(epochs - 1, 1)),
        "criterion": torch.nn.CrossEntropyLoss(label_smoothing=0.1),
    }


def by_epoch(epochs: int) -> dict[str, Any]:
    """AdamW with a cosine in Avalanche's plugin."""
    optimizer = AdamW([torch.zeros(1)], lr=LR)
    return {"optimizer": optimizer, "plugins": [LRSchedulerPlugin(CosineAnnealingLR(optimizer, epochs))]}


def by_iteration(epochs: int) -> dict[str, Any]:
    """AdamW with a warm-up of ten steps in Avalanche's plugin."""
    optimizer = AdamW([torch.zeros(1)], lr=LR)
    schedule = LinearLR(optimizer, start_factor=0.1, total_iters=10)
    return {"optimizer": optimizer, "plugins": [LRSchedulerPlugin(schedule, step_granularity="iteration")]}


def replay(epochs: int) -> dict[str, Any]:
    """A memory of 100 images."""
    return {"plugins": [ReplayPlugin(mem_size=100)]}


def ewc(epochs: int) -> dict[str, Any]:
    """Elastic weight consolidation."""
    return {"plugins": [EWCPlugin(ewc_lambda=1000.0)]}


# --- streams, of what a benchmark has and a backbone takes -----------------------------------------------------------


def tasks(data: BenchmarkData, backbone: FrozenBackbone) -> Stream:
    """The benchmark's own tasks."""
    streams = to_avalanche(*prepare(data, backbone))
    return streams.train_stream, streams.test_stream


def domains(data: BenchmarkData, backbone: FrozenBackbone) -> Stream:
    """All classes three times: as they are, in half the contrast, and with dark and bright exchanged."""

    def seen(images: Any, as_domain: Callable[[Any], Any]) -> ImageSet:
        return ImageSet([as_domain(image) for image in images.images], images.labels)

    changes: list[Callable[[Any], Any]] = [lambda x: x, lambda x: x // 2 + 64, lambda x: 255 - x]
    train: list[Any] = []
    test: list[Any] = []
    for change in changes:
        domain = dataclasses.replace(data, train=seen(data.train, change), test=seen(data.test, change))
        for found, stream in zip((train, test), tasks(domain, backbone), strict=True):
            found.append(concat_datasets([experience.dataset for experience in stream]))
    made = with_classes_timeline(benchmark_from_datasets(train=train, test=test))
    return made.train_stream, made.test_stream


def online(data: BenchmarkData, backbone: FrozenBackbone) -> Stream:
    """The tasks in parts of 20 images, which come once."""
    train, test = tasks(data, backbone)
    return split_online_stream(train, experience_size=20, seed=0), test


def repetition(data: BenchmarkData, backbone: FrozenBackbone) -> Stream:
    """Half of the images of each task's classes, together with the other half of the task before."""
    train, test = tasks(data, backbone)
    cut = [
        (experience.dataset.subset(range(0, size, 2)), experience.dataset.subset(range(1, size, 2)))
        for experience in train
        for size in [len(experience.dataset)]
    ]
    again = [concat_datasets([new, old]) for (_, old), (new, _) in pairwise(cut)]
    parts = [cut[0][0], *again, cut[-1][1]]
    return with_classes_timeline(benchmark_from_datasets(train=parts)).train_stream, test


def nothing(epochs: int) -> dict[str, Any]:
    """The method's own recipe."""
    return {}


COLUMNS: dict[str, tuple[Callable[[int], dict[str, Any]], Callable[[BenchmarkData, FrozenBackbone], Stream]]] = {
    "own recipe": (nothing, tasks),
    "AdamW, warm-up, smoothing": (warm_up, tasks),
    "schedule by epoch": (by_epoch, tasks),
    "by iteration": (by_iteration, tasks),
    "replay": (replay, tasks),
    "EWC": (ewc, tasks),
    "domains": (nothing, domains),
    "online": (nothing, online),
    "repetition": (nothing, repetition),
}


def main(
    strategies: Annotated[
        list[str] | None, typer.Option(callback=one_of(known_strategies()), help="Default: all of them.")
    ] = None,
    seeds: Annotated[list[int] | None, typer.Option(help="Default 0.")] = None,
    benchmark: str = "digits",
    backbone: str = "vit_glyph_tiny",
    train: Annotated[int, typer.Option(min=2, help="Training images of each class.")] = 30,
    test: Annotated[int, typer.Option(min=1, help="Test images of each class.")] = 20,
    epochs: Annotated[int, typer.Option(min=1, help="Of each task; online streams are seen once.")] = 3,
) -> None:
    """Train, then print the table as Markdown."""
    torch.set_num_threads(1)
    frozen, seeds = FrozenBackbone.load(backbone), seeds or [0]
    print(f"{benchmark}, seeds {', '.join(map(str, seeds))}, {train} training images of each class, {epochs} epochs\n")
    print(f"| strategy | {' | '.join(COLUMNS)} |\n|---|{'--:|' * len(COLUMNS)}")
    notes: list[str] = []
    for name in strategies or known_strategies():
        row = []
        for column in COLUMNS:
            runs = [run(name, column, frozen, loaded(benchmark, seed, train, test), epochs, seed) for seed in seeds]
            told = sorted({note for _, found in runs for note in found})
            notes += [note for note in told if note not in notes]
            marks = "".join(f" [{notes.index(note) + 1}]" for note in told)
            row.append(with_deviation(Stat.of([reached for reached, _ in runs]), 1) + marks)
        print(f"| {name} | {' | '.join(row)} |", flush=True)
    if notes:
        print()
    for place, note in enumerate(notes, 1):
        print(f"[{place}] {note}  ")


def loaded(benchmark: str, seed: int, train: int, test: int) -> BenchmarkData:
    """The first images of each class of a benchmark."""
    data = parse_benchmark(benchmark, {})[1].load(seed)
    assert isinstance(data.train, ImageSet) and isinstance(data.test, ImageSet)
    return dataclasses.replace(data, train=first(data.train, train), test=first(data.test, test))


def run(
    name: str, column: str, backbone: FrozenBackbone, data: BenchmarkData, epochs: int, seed: int
) -> tuple[float | None, Sequence[str]]:
    """Accuracy in the end, percent, or None where the strategy refuses; and what it said."""
    recipe, stream = COLUMNS[column]
    brought = recipe(1 if column == "online" else epochs)
    settings: dict[str, Any] = next(
        (found.read()["strategy"] for found in presets() if (found.strategy, found.name) == (name, data.name)), {}
    )
    if "optimizer" in brought:
        settings = {key: value for key, value in settings.items() if key != "lr"}
    if "train_epochs" in settings:
        settings = settings | {"train_epochs": 1 if column == "online" else epochs}
    cls: Any = registry.get(name)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        evaluator = EvaluationPlugin(accuracy_metrics(stream=True), loggers=[])
        try:
            strategy = cls(backbone, seed=seed, evaluator=evaluator, **brought, **settings)
            train, test = stream(data, backbone)
            for experience in train:
                strategy.train(experience)
        except (ConfigError, DataError) as error:
            return None, [str(error)]
        (reached,) = strategy.eval(test).values()
    said = [str(each.message) for each in told if issubclass(each.category, UserWarning)]
    return 100 * float(reached), list(dict.fromkeys(text for text in said if cls.__name__ in text))


if __name__ == "__main__":
    command_of(main, __doc__)()
