"""A tiny MOS and a tiny LAE with a few tasks of noisy images, for the numbers that come from training."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from avalanche.benchmarks import benchmark_from_datasets
from avalanche.benchmarks.utils import AvalancheDataset, DataAttribute
from torch.utils.data import TensorDataset

from cl_adapters.strategies.lae import LAE
from cl_adapters.strategies.mos import MOS


@pytest.fixture
def two_tasks(three_tasks: list[Any]) -> list[Any]:
    """The first two of :func:`three_tasks`."""
    return three_tasks[:2]


@pytest.fixture
def three_tasks() -> list[Any]:
    """Avalanche experiences: labels {0, 1}, {2, 3, 4}, {5}; 12 images float32 [3, 16, 16] each."""
    generator = torch.Generator().manual_seed(0)
    datasets = []
    for labels in ((0, 1), (2, 3, 4), (5,)):
        y = torch.tensor(labels).repeat(12 // len(labels))
        x = torch.randn(12, 3, 16, 16, generator=generator) + y[:, None, None, None] * 0.3
        datasets.append(AvalancheDataset([TensorDataset(x, y)], data_attributes=[DataAttribute(y.tolist(), "targets")]))
    return list(benchmark_from_datasets(train=datasets).train_stream)


@pytest.fixture
def make_mos(tiny_vit: Callable[..., torch.nn.Module]) -> Callable[..., MOS]:
    """Factory of MOS on a ViT of width 16 and depth 3, without dropout unless asked for."""

    def make(**options: Any) -> MOS:
        values: dict[str, Any] = {
            "adapter": {"bottleneck": 4, "dropout": 0.0},
            "train_mb_size": 4,
            "train_epochs": 2,
            "alignment": {"epochs": 0},
        }
        backbone = tiny_vit(width=16, heads=2, img_size=16)
        return MOS(model=backbone, evaluator=None, seed=3, **(values | options))

    return make


@pytest.fixture
def make_lae(tiny_vit: Callable[..., torch.nn.Module]) -> Callable[..., LAE]:
    """Factory of LAE on a ViT of width 16 and depth 3; 12 images in batches of 4 are 3 steps an epoch."""

    def build(**options: Any) -> LAE:
        values: dict[str, Any] = {"train_mb_size": 4, "train_epochs": 5, "lr": 0.01, "decay": 0.9}
        model = options.pop("model", None) or tiny_vit(width=16, heads=2, img_size=16)
        return LAE(model=model, evaluator=None, seed=3, **(values | options))

    return build
