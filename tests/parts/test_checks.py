"""Parts that cannot serve the model in whose files they are, and answers that are no numbers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from cl_adapters.backbones.frozen import FrozenBackbone
from cl_adapters.errors import ClAdaptersError, DataError, StorageError
from cl_adapters.model.facade import AdapterModel
from cl_adapters.parts import Part
from cl_adapters.parts.class_means import ClassMeans
from cl_adapters.parts.keys import Keys, KeysConfig
from cl_adapters.parts.ridge import Ridge, random_projection
from cl_adapters.predictors.fixed import Fixed
from cl_adapters.predictors.max_ensemble import MaxEnsemble
from tests.models import random_model

WIDTH, CLASSES = 16, 3


@pytest.fixture
def model(tiny_vit: Callable[..., nn.Module]) -> AdapterModel:
    backbone = FrozenBackbone.wrap(tiny_vit(width=WIDTH, heads=2, img_size=16, depth=2))
    return random_model(backbone, [[0, 1], [2]])


def ridge() -> Part:
    made = Ridge(random_projection(WIDTH, 8, torch.Generator().manual_seed(0)))
    made.sums_CM, made.weights_CM = torch.zeros(CLASSES, 8), torch.zeros(CLASSES, 8)
    return made


def class_means() -> Part:
    made = ClassMeans(2 * WIDTH)
    made.head.append(torch.ones(CLASSES, 2 * WIDTH))
    return made


def keys() -> Part:
    made = Keys(KeysConfig(kind="features", held_out=0), WIDTH)
    for _ in range(CLASSES):
        made.add_class(torch.ones(2, WIDTH), torch.Generator())
    return made


@pytest.mark.parametrize("make", [ridge, class_means, keys])
def test_a_part_fits_its_model_or_says_why_not(make: Callable[[], Part]) -> None:
    make().check(CLASSES, WIDTH)
    for classes, width in ((CLASSES - 1, WIDTH), (CLASSES, WIDTH + 1)):
        with pytest.raises(DataError, match=f"{classes} classes"):
            make().check(classes, width)
    with pytest.raises(DataError, match=r"is torch.float16, float32 is expected"):
        make().half().check(CLASSES, WIDTH)
    whole = make()
    for name in whole.floats:
        setattr(whole, name, getattr(whole, name).int())
        with pytest.raises(DataError, match=f"{name} is torch.int32, float32 is expected"):
            whole.check(CLASSES, WIDTH)
        setattr(whole, name, getattr(whole, name).float())


def test_a_class_less_than_its_part_has(model: AdapterModel, tmp_path: Path) -> None:
    model.parts["ridge"] = ridge()
    assert isinstance(model.parts["ridge"], Ridge)
    model.parts["ridge"].weights_CM = torch.zeros(CLASSES + 1, 8)
    with pytest.raises(StorageError, match="part 'ridge'"):
        AdapterModel.load(model.save(tmp_path / "model"), model.backbone)


def test_logits_that_are_no_numbers(model: AdapterModel) -> None:
    x = torch.zeros(1, 3, 16, 16)
    model.predictor = Fixed(slot=0)
    with torch.no_grad():
        model.head.weight[0] = torch.tensor([1e38, -1e38]).repeat(WIDTH // 2)
        for parameter in model.bank.parameters() if model.bank is not None else ():
            parameter.mul_(1e30)
    with pytest.raises(ClAdaptersError, match=r"logits are no numbers \(NaN\)"):
        model.answer(x)


def test_a_model_without_the_head_that_its_predictor_needs(model: AdapterModel) -> None:
    model.head.weight, model.head.bias = nn.Parameter(torch.empty(0, WIDTH)), nn.Parameter(torch.empty(0))
    model.predictor = Fixed(slot=0)
    with pytest.raises(ClAdaptersError, match="has no linear head, which its predictor needs"):
        model.answer(torch.zeros(1, 3, 16, 16))


@pytest.mark.parametrize("slot", [2, 7])
def test_an_adapter_that_the_model_does_not_have(model: AdapterModel, slot: int) -> None:
    """Its features were those of another row of the batch."""
    x = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with pytest.raises(ClAdaptersError, match=f"slot {slot} was asked for, but the model has 2 adapters"):
        model.answer(x, predictor=MaxEnsemble(slots=(0, slot)))
