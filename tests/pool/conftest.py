"""A backbone of two blocks that needs no model zoo, adapters for it, and a pool with two of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cl_adapters.adapters.bottleneck import Bottleneck
from cl_adapters.backbones.frozen import FrozenBackbone
from cl_adapters.bank.bank import AdapterBank
from cl_adapters.pool import AdapterPool, PoolClass
from cl_adapters.sites.sites import Site, Tap

D = 8
BOTTLENECK = Bottleneck(bottleneck=2)


class Encoder(nn.Module):
    """[B, N, D] to features [B, D]."""

    def __init__(self) -> None:
        super().__init__()
        self.num_features = D
        self.blocks = nn.ModuleList(nn.Linear(D, D) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x.mean(1)


def make_backbone(seed: int = 0, **options: Any) -> FrozenBackbone:
    encoder = Encoder()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.normal_(generator=generator)
    sites = [
        Site(f"blocks.{i}.ffn", i, "ffn_parallel", D, Tap(f"blocks.{i}", "in"), Tap(f"blocks.{i}", "out"))
        for i in range(2)
    ]
    return FrozenBackbone.wrap(encoder, name=f"seed-{seed}", pooling="encoder", sites=sites, **options)


def make_tensors(seed: int, blocks: list[int] | None = None) -> dict[str, Tensor]:
    """Tensors of a ``BOTTLENECK`` adapter, none of them zero."""
    generator = torch.Generator().manual_seed(seed)
    fresh = AdapterBank(make_backbone(), BOTTLENECK).fresh(generator, blocks)
    return {key: value.normal_(generator=generator) for key, value in fresh.items()}


def make_knowledge(seed: int, classes: int = 2) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "keys": torch.randn(6, D, generator=generator),
        "key_class": torch.arange(6) % classes,
        "head.weight": torch.randn(classes, D, generator=generator),
        "head.bias": torch.randn(classes, generator=generator),
        "prototypes": torch.randn(classes, D, generator=generator),
        "held_out": torch.randn(3, D, generator=generator),
        "held_out_class": torch.arange(3) % classes,
    }


def classes_of(task: int) -> list[PoolClass]:
    return [PoolClass(label=2 * task, name=f"class {2 * task}"), PoolClass(label=2 * task + 1)]


def fill(path: Path, adapters: int = 2) -> AdapterPool:
    """A pool with that many adapters, "task-000" and so on; the first has the tag "even"."""
    pool = AdapterPool.create(path, make_backbone())
    for task in range(adapters):
        pool.add(
            make_tensors(task),
            BOTTLENECK,
            classes_of(task),
            knowledge=make_knowledge(task),
            tags=["even"] if task % 2 == 0 else [],
            task=task,
            benchmark="digits",
            metrics={"accuracy": 90.5 + task},
        )
    return pool


@pytest.fixture
def backbone() -> FrozenBackbone:
    return make_backbone()


@pytest.fixture
def pool(tmp_path: Path) -> AdapterPool:
    return fill(tmp_path / "pool")


@pytest.fixture
def tensors() -> Callable[..., dict[str, Tensor]]:
    return make_tensors


@pytest.fixture
def knowledge() -> Callable[..., dict[str, Tensor]]:
    return make_knowledge
