"""Trainable numbers of MOS on ViT-B/16, as the released logs print them.

12 adapters of 2 x 768 x 16 + 16 + 768 = 25,360 each, and 769 per class: 381,220 (CIFAR-100), 458,120 (200 classes),
535,020 (OmniBenchmark), 342,770 (VTAB). The backbone is on the meta device: shapes, and no memory.
"""

from __future__ import annotations

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer

from cl_adapters.strategies.mos import MOS


@pytest.fixture(scope="module")
def backbone() -> torch.nn.Module:
    with torch.device("meta"):
        model: torch.nn.Module = VisionTransformer(num_classes=0)
    return model


@pytest.mark.parametrize(("classes", "numbers"), [(100, 381_220), (200, 458_120), (300, 535_020), (50, 342_770)])
def test_adapters_and_head(backbone: torch.nn.Module, classes: int, numbers: int) -> None:
    strategy = MOS(model=backbone, device="meta", evaluator=None)
    strategy.model.add_task(range(classes))
    strategy.grow(0)
    (phase,) = strategy.phases(0)
    assert phase.num_parameters == numbers
    assert sum(p.numel() for p in strategy.model.parameters() if p.requires_grad) == numbers, "nothing else trains"
    assert len(strategy.model.bank.sites) == 12
