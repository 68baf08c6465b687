"""Small streams of Avalanche."""

from __future__ import annotations

from typing import Any

import torch
from avalanche.benchmarks import benchmark_from_datasets
from avalanche.benchmarks.scenarios.supervised import with_classes_timeline
from avalanche.benchmarks.utils import as_classification_dataset


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
