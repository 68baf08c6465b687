"""Models as MOS leaves them, to become pools."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from cl_adapters.adapters.bottleneck import Bottleneck
from cl_adapters.backbones.frozen import FrozenBackbone
from cl_adapters.bank.bank import AdapterBank
from cl_adapters.model.facade import AdapterModel
from cl_adapters.model.state import Origin
from cl_adapters.parts.keys import Keys, KeysConfig
from cl_adapters.predictors import Predictor
from cl_adapters.predictors.self_refine import SelfRefine

WIDTH = 16
Make = Callable[..., AdapterModel]


@pytest.fixture
def backbone(tiny_vit: Callable[..., nn.Module]) -> FrozenBackbone:
    return FrozenBackbone.wrap(tiny_vit(width=WIDTH, heads=2, img_size=16, depth=2), name="tiny")


@pytest.fixture
def make_model(backbone: FrozenBackbone) -> Make:
    """Factory of models as MOS leaves them: an adapter per task, made of those before; 2, 1, 3, ... classes."""

    def make(tasks: int = 4, predictor: Predictor | None = None) -> AdapterModel:
        model = AdapterModel(backbone, AdapterBank(backbone, Bottleneck(bottleneck=4, scale=1.0)))
        draw = torch.Generator().manual_seed(0)
        assert model.bank is not None
        model.parts["class_keys"] = keys = Keys(KeysConfig(kind="features", held_out=0.4), WIDTH)
        for task in range(tasks):
            labels = list(range(100 - 10 * task, 100 - 10 * task + (2, 1, 3)[task % 3]))
            model.add_task(labels)
            model.class_names[labels[0]] = f"class {labels[0]}"
            fresh = model.bank.fresh(draw)
            slot = model.bank.add_slot({name: 0.5 * torch.randn(v.shape, generator=draw) for name, v in fresh.items()})
            model.assign_new_slots(task)
            merge = {"method": "ema", "momentum": 0.1, "head": "aligned"}
            model.origins[slot] = Origin(parents=tuple(range(slot)), merge=merge if slot else None)
            model.head.grow(len(labels), draw)
            for _ in labels:
                keys.add_class(torch.randn(5, WIDTH, generator=draw), draw)
        with torch.no_grad():
            model.head.weight.normal_(generator=draw)
            model.head.bias.normal_(generator=draw)
        model.prototypes.append(torch.randn(len(model.classes), WIDTH, generator=draw))
        model.predictor = predictor or SelfRefine()
        return model

    return make


@pytest.fixture
def x() -> Tensor:
    return torch.randn(24, 3, 16, 16, generator=torch.Generator().manual_seed(7))
