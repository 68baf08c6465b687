"""What the tests of strategies share: benchmarks in every style of Avalanche, small strategies, their whole state."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

TASKS = ((7, 3), (11,), (0, 5))
STYLES = ("sets", "targets only", "lists", "lists, renumbered", "class incremental")


class NoisyImages(Dataset[tuple[Tensor, int]]):
    """Images float32 [3, 16, 16] of a class colour; every look adds noise from each global generator."""

    def __init__(self, labels: Sequence[int], per_class: int, seed: int, noise: float = 0.2) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.targets = [label for label in labels for _ in range(per_class + label % 3)]
        colours = torch.randn(20, 3, 1, 1, generator=torch.Generator().manual_seed(0))
        rows = torch.tensor(self.targets)
        self.images = colours[rows] + 0.3 * torch.randn(len(rows), 3, 16, 16, generator=generator)
        self.noise = noise

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        drawn = torch.randn(1).item() + float(np.random.randn()) + random.random()
        return self.images[index] + self.noise * drawn, self.targets[index]


def make_benchmark(style: str, per_class: int = 4, tasks: Sequence[Sequence[int]] = TASKS) -> Any:
    """An Avalanche benchmark of three unequal tasks in one of the styles in which experiences come.

    Classes as a set, as a list, or only in the targets; labels with gaps, or shuffled ones (in "class incremental",
    where Avalanche takes no gaps).
    """
    from avalanche import benchmarks as a

    order = [label for task in tasks for label in task]
    if style == "class incremental":
        small = {label: position for position, label in enumerate(sorted(order))}
        order = [small[label] for label in order]
        data = {"train": NoisyImages(range(5), per_class, 1), "test": NoisyImages(range(5), 2, 2, noise=0)}
        return a.class_incremental_benchmark(data, class_order=order, num_classes_per_exp=[len(t) for t in tasks])
    if style.startswith("lists"):
        sizes = {position: len(task) for position, task in enumerate(tasks)}
        train, test = NoisyImages(order, per_class, 1), NoisyImages(order, 2, 2, noise=0)
        return a.nc_benchmark(
            train,
            test,
            len(tasks),
            task_labels=False,
            fixed_class_order=order,
            per_exp_classes=sizes,
            class_ids_from_zero_from_first_exp=style == "lists, renumbered",
        )
    splits = {"train": [NoisyImages(t, per_class, 1) for t in tasks], "test": [NoisyImages(t, 2, 2, 0) for t in tasks]}
    streams = {name: [experience_data(part) for part in parts] for name, parts in splits.items()}
    made = a.benchmark_from_datasets(**streams)
    return a.with_classes_timeline(made) if style == "sets" else made


def experience_data(data: Any) -> Any:
    """An AvalancheDataset with targets."""
    from avalanche.benchmarks.utils import AvalancheDataset, DataAttribute

    return AvalancheDataset([data], data_attributes=[DataAttribute(list(data.targets), "targets")])


SMALL_OPTIONS: dict[str, Any] = {
    "train_epochs": 2,
    "train_mb_size": 4,
    "eval_mb_size": 5,
    "lr": 0.05,
    "adapter": {"type": "bottleneck", "bottleneck": 4},
    "alignment": {"epochs": 2},
    "projection": 24,
}
"""Options that make training quick; a strategy gets those that its configuration has."""


class Lab:
    """What a test of a strategy needs; reached through the fixture ``lab``."""

    tasks = TASKS
    styles = STYLES
    images = NoisyImages
    benchmark = staticmethod(make_benchmark)
    experience_data = staticmethod(experience_data)

    def __init__(self, tiny_vit: Callable[..., nn.Module]) -> None:
        self.tiny_vit = tiny_vit

    def vit(self) -> nn.Module:
        """The same random ViT every time."""
        return self.tiny_vit(width=16, heads=2, img_size=16, depth=2)

    def make(self, name: str, *, model: nn.Module | None = None, seed: int = 5, **options: Any) -> Any:
        """A small strategy of that registered name; ``options`` as its constructor takes them."""
        from cl_adapters.strategies.base import strategies

        cls: Any = strategies.get(name)
        known = {field.name for field in dataclasses.fields(cls.Config)}
        small = {key: value for key, value in SMALL_OPTIONS.items() if key in known}
        return cls(model=model or self.vit(), seed=seed, **{"evaluator": None, **small, **options})

    def probe(self, n: int = 9) -> Tensor:
        """Images float32 [n, 3, 16, 16] of no particular class."""
        return torch.randn(n, 3, 16, 16, generator=torch.Generator().manual_seed(11))

    def state(self, strategy: Any) -> dict[str, Any]:
        """Every tensor of a strategy and its model, and what else evaluation must leave alone."""
        model = strategy.model
        found: dict[str, Any] = {f"model.{key}": value.clone() for key, value in model.state_dict().items()}
        if model.statistics is not None:
            found |= {f"statistics.{key}": value.clone() for key, value in model.statistics.tensors().items()}
        found["task_of_column"] = model.task_of_column.clone()
        found["classes"] = (list(model.classes), dict(model.returned), dict(model.samples))
        found["predictor"] = model.predictor
        found["requires_grad"] = {key: value.requires_grad for key, value in model.named_parameters()}
        found["rng"] = (torch.get_rng_state(), random.getstate(), str(np.random.get_state()))
        return found

    def differing(self, first: dict[str, Any], second: dict[str, Any]) -> list[str]:
        """Keys that differ between two states, bit for bit."""
        return [key for key in first.keys() | second.keys() if not _equal(first.get(key), second.get(key))]


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, tuple) and isinstance(b, tuple):
        return len(a) == len(b) and all(map(_equal, a, b))
    return bool(a == b)


@pytest.fixture
def lab(tiny_vit: Callable[..., nn.Module]) -> Lab:
    """Benchmarks, small strategies and their states."""
    return Lab(tiny_vit)
