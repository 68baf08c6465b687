"""Models as MOS leaves them, to become pools."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from cl_adapters.backbones.frozen import FrozenBackbone
from cl_adapters.model.facade import AdapterModel
from cl_adapters.predictors import Predictor
from cl_adapters.predictors.self_refine import SelfRefine
from tests.models import random_model

WIDTH = 16
Make = Callable[..., AdapterModel]


@pytest.fixture
def backbone(tiny_vit: Callable[..., nn.Module]) -> FrozenBackbone:
    return FrozenBackbone.wrap(tiny_vit(width=WIDTH, heads=2, img_size=16, depth=2), name="tiny")


@pytest.fixture
def make_model(backbone: FrozenBackbone) -> Make:
    """Factory of models as MOS leaves them: an adapter per task, made of those before; 2, 1, 3, ... classes."""

    def make(tasks: int = 4, predictor: Predictor | None = None) -> AdapterModel:
        starts = [100 - 10 * task for task in range(tasks)]
        labels = [list(range(start, start + (2, 1, 3)[task % 3])) for task, start in enumerate(starts)]
        model = random_model(backbone, labels, held_out=0.4, keys_per_class=5, merged=True)
        model.class_names |= {first: f"class {first}" for first in starts}
        model.predictor = predictor or SelfRefine()
        return model

    return make


@pytest.fixture
def x() -> Tensor:
    return torch.randn(24, 3, 16, 16, generator=torch.Generator().manual_seed(7))
