"""Every strategy that trains adapters takes every adapter type for which the backbone has sites, or says no at once."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from cl_adapters.adapters import adapters
from cl_adapters.errors import IncompatibleBackbone
from cl_adapters.strategies.base import strategies
from cl_adapters.strategies.config import TrainingConfig

TRAINING = [name for name in strategies.names() if "adapter" in vars(strategies.get(name).Config())]


def test_strategies_with_adapters_are_known() -> None:
    assert {"mos", "sema", "lae", "ranpac", "sequential", "joint"} <= set(TRAINING)
    assert all(isinstance(strategies.get(name).Config(), TrainingConfig) or name == "lae" for name in TRAINING)


@pytest.mark.parametrize("kind", adapters.names())
@pytest.mark.parametrize("name", TRAINING)
def test_learns_with_every_type_or_refuses_before_training(name: str, kind: str, lab: Any) -> None:
    if adapters.get(kind).layout == "map":
        with pytest.raises(IncompatibleBackbone, match=r"has no sites of kind 'block_parallel'|needs feature maps"):
            lab.make(name, adapter={"type": kind})
        return
    strategy = lab.make(name, adapter={"type": kind})
    start: dict[str, torch.Tensor] = {}
    for experience in lab.benchmark("sets").train_stream:
        strategy.train(experience)
        start = start or strategy.model.bank.export(0)
    assert strategy.model.predict(lab.probe()).isfinite().all()
    fresh = strategy.model.bank.fresh(strategy.generator("adapter", 0))
    moved = [key for key in fresh if not torch.equal(start[key], fresh[key])]
    assert moved, "the first task trained the adapter"
    assert not any(p.requires_grad for p in strategy.model.backbone.parameters())


@pytest.mark.parametrize("name", TRAINING)
def test_learns_on_feature_maps(name: str, lab: Any) -> None:
    from timm.models.convnext import ConvNeXt

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = ConvNeXt(depths=(1, 1, 1, 1), dims=(8, 8, 12, 12), patch_size=4, output_stride=8, num_classes=0)
    strategy = lab.make(name, model=network, adapter={"type": "conv_bottleneck", "bottleneck": 3})
    for experience in lab.benchmark("sets").train_stream:
        strategy.train(experience)
    assert strategy.model.predict(lab.probe()).isfinite().all()
