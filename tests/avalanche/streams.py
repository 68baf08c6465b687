"""Small streams of Avalanche."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from avalanche.benchmarks import (
    benchmark_from_datasets,
    benchmark_with_validation_stream,
    class_incremental_benchmark,
    data_incremental_benchmark,
    nc_benchmark,
    new_instances_benchmark,
    split_online_stream,
    with_classes_timeline,
)
from avalanche.benchmarks.utils import as_classification_dataset
from torch.utils.data import TensorDataset

PATTERNS = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(9))


def two_experiences(size: int = 16) -> list[Any]:
    """Two experiences of two classes, 12 images of ``size`` pixels each: two batches of 6."""
    draw, sets = torch.Generator().manual_seed(0), []
    for first in (0, 2):
        labels = torch.arange(first, first + 2).repeat(6)
        images = torch.randn(4, 3, size, size, generator=torch.Generator().manual_seed(9))[labels]
        data: Any = torch.utils.data.TensorDataset(
            images + 0.3 * torch.randn(12, 3, size, size, generator=draw), labels
        )
        data.targets = labels.tolist()
        sets.append(as_classification_dataset(data))
    return list(with_classes_timeline(benchmark_from_datasets(train=sets)).train_stream)


def pairs(shuffled: bool = False, classes: int = 4, each: int = 6) -> list[Any]:
    """Experiences of two classes with task label 0, ``each`` images of a class; shuffled: [3, 1] comes first."""
    labels, draw = torch.arange(classes).repeat(each), torch.Generator().manual_seed(1)
    x = torch.randn(classes, 3, 16, 16, generator=draw)[labels]
    x = x + 0.3 * torch.randn(each * classes, 3, 16, 16, generator=draw)
    data: Any = TensorDataset(x, labels)
    data.targets = labels.tolist()
    order = [3, 1, 0, 2] if shuffled else list(range(classes))
    return list(nc_benchmark(data, data, classes // 2, task_labels=False, fixed_class_order=order).train_stream)


def images(labels: Sequence[int], each: int, seed: int, light: float = 0.0, names: Sequence[int] = range(4)) -> Any:
    """``each`` noisy images [3, 16, 16] of every label's pattern, ``light`` brighter; ``names`` are other labels."""
    rows = torch.tensor([label for _ in range(each) for label in labels])
    noise = torch.randn(len(rows), 3, 16, 16, generator=torch.Generator().manual_seed(seed))
    targets = torch.tensor(names)[rows]
    data: Any = TensorDataset(PATTERNS[rows] + 0.3 * noise + light, targets)
    data.targets = targets.tolist()
    return data


def benchmark(*parts: Any, test: Any = None) -> Any:
    """Of these data sets, one experience each."""
    test = images(range(4), 6, 99) if test is None else test
    sets = {"train": [as_classification_dataset(part) for part in parts], "test": [as_classification_dataset(test)]}
    return with_classes_timeline(benchmark_from_datasets(**sets))


def in_turn(*tasks: Sequence[int], each: int = 6, names: Sequence[int] = range(4)) -> Any:
    """These classes, one experience each, in which ``names`` are their labels."""
    parts = (images(labels, each, seed, names=names) for seed, labels in enumerate(tasks))
    return benchmark(*parts, test=images(range(4), 6, 99, names=names))


def with_task_labels() -> Any:
    """Two experiences of two classes with task labels 0 and 1."""
    return nc_benchmark(images(range(4), 12, 0), images(range(4), 6, 99), 2, task_labels=True, seed=0)


def domains() -> Any:
    """All four classes in each of three lights."""
    return benchmark(*(images(range(4), 3, seed, light=0.3 * seed) for seed in range(3)))


def repetition() -> Any:
    """Classes come, some again, some new: the third experience has no new class."""
    return benchmark(*(images(labels, 4, seed) for seed, labels in enumerate(([2, 0], [0, 1], [2], [3, 0, 1]))))


def halves() -> Any:
    """Two experiences of two classes."""
    sets = {"train": images(range(4), 12, 0), "test": images(range(4), 6, 99)}
    return class_incremental_benchmark(
        {key: as_classification_dataset(value) for key, value in sets.items()},
        class_order=[2, 0, 1, 3],
        num_experiences=2,
    )


def online(whole: Any) -> list[Any]:
    return list(split_online_stream(whole.train_stream, experience_size=8, seed=0))


def new_instances() -> Any:
    parts = (images(range(4), 9, 0), images(range(4), 6, 99))
    return new_instances_benchmark(*map(as_classification_dataset, parts), num_experiences=3, seed=0)


def parts() -> Any:
    """Of two experiences of two classes, three each; one without task labels in the old style of Avalanche."""
    whole = nc_benchmark(images(range(4), 12, 0), images(range(4), 6, 99), 2, task_labels=False, seed=0)
    return data_incremental_benchmark(whole, 8)


def with_validation() -> Any:
    return benchmark_with_validation_stream(halves(), 0.25, shuffle=True, seed=0)
