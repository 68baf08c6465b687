"""Avalanche's own strategies on one adapter and a head (``AdaptedNet``), on a subset of a benchmark of images.

    python -m cl_adapters.benchmarks.bench.avalanche_strategies --seeds 0 1 2

Accuracies in percent, mean ± standard deviation over the seeds, which set class order, initial values, order of the
images and augmentation: "first task" on the test images of the first task, when it was learned and in the end; "all
tasks" on all test images in the end. An image is given one of all classes each time, whether they came or not. One
thread; GEM needs the package quadprog.
"""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any

import numpy as np
import torch
import typer
from avalanche.training import supervised
from avalanche.training.plugins import EvaluationPlugin
from torch import nn
from torch.utils.data import DataLoader

from cl_adapters._seeding import derive, isolated, seed_globals
from cl_adapters.backbones.frozen import FrozenBackbone
from cl_adapters.benchmarks.base import ImageSet
from cl_adapters.benchmarks.bench._command import command_of, one_of
from cl_adapters.benchmarks.bench.comparison import Stat, with_deviation
from cl_adapters.benchmarks.spec import parse_benchmark
from cl_adapters.benchmarks.streams.avalanche import to_avalanche
from cl_adapters.benchmarks.streams.prepared import prepare
from cl_adapters.strategies.adapted_net import AdaptedNet

BATCH = 32
HEAD = ("strategy", "first task, when learned", "first task, in the end", "all tasks, in the end")


def options_of(memory: int, tasks: int) -> dict[str, dict[str, Any]]:
    """Each strategy's own options, with so many images kept in all."""
    return {
        "Naive": {},
        "Replay": {"mem_size": memory},
        "DER": {"mem_size": memory, "batch_size_mem": BATCH, "alpha": 0.5, "beta": 0.5},
        "ER_ACE": {"mem_size": memory, "batch_size_mem": BATCH},
        "GEM": {"patterns_per_exp": memory // tasks, "memory_strength": 0.5},
        "Cumulative": {},
    }


def main(
    strategies: Annotated[
        list[str] | None, typer.Option(callback=one_of(options_of(1, 1)), help="Default: all of them.")
    ] = None,
    seeds: Annotated[list[int] | None, typer.Option(help="Default 0 to 2.")] = None,
    benchmark: str = "digits",
    backbone: str = "vit_glyph_tiny",
    train: Annotated[int, typer.Option(min=1, help="Training images of each class.")] = 40,
    epochs: Annotated[int, typer.Option(min=1)] = 3,
    memory: Annotated[int, typer.Option(min=BATCH, help="Images kept of the tasks before.")] = 100,
    lr: float = 0.003,
) -> None:
    """Train, then print the table as Markdown."""
    torch.set_num_threads(1)
    frozen = FrozenBackbone.load(backbone)
    print("| " + " | ".join(HEAD) + " |\n|---|" + "--:|" * (len(HEAD) - 1))
    for name in strategies or options_of(1, 1):
        runs = [run(name, frozen, benchmark, seed, train, epochs, memory, lr) for seed in seeds or [0, 1, 2]]
        cells = [with_deviation(Stat.of(column), 1) for column in zip(*runs, strict=True)]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


def run(
    name: str, backbone: FrozenBackbone, benchmark: str, seed: int, train: int, epochs: int, memory: int, lr: float
) -> tuple[float, float, float]:
    """The three accuracies of one run."""
    data = parse_benchmark(benchmark, {})[1].load(seed)
    assert isinstance(data.train, ImageSet)
    streams = to_avalanche(*prepare(dataclasses.replace(data, train=first(data.train, train)), backbone))
    net = AdaptedNet(backbone, len(data.classes), seed=seed)
    with isolated():
        seed_globals(derive(seed, name))
        strategy = getattr(supervised, name)(
            model=net,
            optimizer=torch.optim.Adam(net.parameters(), lr=lr),
            criterion=nn.CrossEntropyLoss(),
            train_mb_size=BATCH,
            train_epochs=epochs,
            evaluator=EvaluationPlugin(),
            **options_of(memory, len(data.tasks))[name],
        )
        on_first = []
        for experience in streams.train_stream:
            strategy.train(experience)
            on_first.append(accuracy(net, streams.test_stream[:1]))
    return on_first[0], on_first[-1], accuracy(net, streams.test_stream)


def first(images: ImageSet, count: int) -> ImageSet:
    """The first so many images of each class."""
    places = [np.flatnonzero(images.labels == label)[:count] for label in np.unique(images.labels)]
    kept = np.sort(np.concatenate(places))
    return ImageSet([images.images[place] for place in kept], images.labels[kept])


@torch.inference_mode()
def accuracy(net: AdaptedNet, experiences: Any) -> float:
    """Percent of the images of these experiences whose class has the largest logit of all."""
    net.eval()
    right = [
        net(x).argmax(1) == y
        for experience in experiences
        for x, y, _ in DataLoader(experience.dataset, batch_size=256)
    ]
    return 100 * torch.cat(right).float().mean().item()


if __name__ == "__main__":
    command_of(main, __doc__)()
