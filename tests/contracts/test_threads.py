"""One backbone, models and an index beside them, asked by many threads: every answer is that of a lone call."""

from __future__ import annotations

import copy
import gc
import itertools
import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from cl_adapters import AdapterIndex
from cl_adapters.backbones.frozen import FrozenBackbone
from cl_adapters.model.facade import AdapterModel
from cl_adapters.predictors.nearest_key import NearestKey
from cl_adapters.predictors.self_refine import SelfRefine
from tests.models import random_model

THREADS = 8


@pytest.fixture
def backbone(tiny_vit: Callable[..., nn.Module]) -> FrozenBackbone:
    return FrozenBackbone.wrap(tiny_vit(width=16, heads=2, img_size=16, depth=2), name="tiny")


def images(seed: int, size: int = 3) -> Tensor:
    return torch.randn(size, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


def questions(backbone: FrozenBackbone, folder: Path) -> list[Callable[[Tensor], Tensor]]:
    """Two models of other adapters, one that loads them on use, the bare backbone, an index, caching and its rest."""
    first = random_model(backbone, [[0, 1], [2], [3, 4, 5]])
    second = random_model(backbone, [[7], [8, 9]], seed=1)
    first.predictor, second.predictor = SelfRefine(), NearestKey()
    pool = first.save_pool(folder / "pool")
    index = AdapterIndex.build(pool)
    lazy = AdapterModel.from_pool(pool, backbone=backbone, limit=1)
    indexed = AdapterModel.from_pool(pool, backbone=backbone, index=index, predictor=NearestKey())
    return [
        lambda x: first.predict(x),
        lambda x: second.answer(x).logits,
        lambda x: lazy.predict(x),
        lambda x: indexed.predict(x),
        lambda x: backbone.features(x),
        lambda x: backbone.resume(backbone.enter(x, 1), 1),
        lambda x: torch.tensor([[hit.score for hit in hits] for hits in index.query(x, k=2)]),
    ]


def check(backbone: FrozenBackbone, folder: Path, calls: int) -> int:
    """Number of calls whose answer differs from that of the same call alone."""
    asked = questions(backbone, folder)
    inputs = [images(seed) for seed in range(4)]
    cases = list(itertools.product(range(len(asked)), range(len(inputs))))
    with torch.no_grad():
        alone = {(which, seed): asked[which](inputs[seed]) for which, seed in cases}

    def one(case: tuple[int, int]) -> bool:
        with torch.no_grad():
            return torch.equal(asked[case[0]](inputs[case[1]]), alone[case])

    drawn = random.Random(0).choices(cases, k=calls)
    with ThreadPoolExecutor(THREADS) as threads:
        wrong = sum(not same for same in threads.map(one, drawn))
    bare = asked[4](inputs[0])
    assert torch.equal(bare, alone[4, 0]), "no route stays when the threads have ended"
    return wrong


@pytest.mark.parametrize("calls", [400, pytest.param(10_000, marks=pytest.mark.slow)])
def test_threads(backbone: FrozenBackbone, tmp_path: Path, calls: int) -> None:
    assert check(backbone, tmp_path, calls) == 0


def hooks(backbone: FrozenBackbone) -> int:
    return sum(len(part._forward_hooks) + len(part._forward_pre_hooks) for part in backbone.encoder.modules())


def living(kind: type) -> int:
    gc.collect()
    return sum(isinstance(thing, kind) for thing in gc.get_objects())


@pytest.mark.parametrize("loads", [50, pytest.param(500, marks=pytest.mark.slow)])
def test_a_model_that_is_gone_leaves_nothing_on_its_backbone(
    backbone: FrozenBackbone, tmp_path: Path, loads: int
) -> None:
    before = hooks(backbone)
    folder = random_model(backbone, [[0, 1], [2]]).save(tmp_path / "model")
    gc.collect()
    parameters = living(nn.Parameter)
    for _ in range(loads):
        AdapterModel.load(folder, backbone)
    assert living(nn.Parameter) == parameters
    assert hooks(backbone) == before == 0


def test_a_copy_has_hooks_of_its_own(backbone: FrozenBackbone) -> None:
    model = random_model(backbone, [[0, 1], [2]])
    model.predictor = SelfRefine()
    x = images(0)
    wanted = model.predict(x)
    twin = copy.deepcopy(model)
    assert twin.bank is not None
    assert torch.equal(twin.predict(x), wanted)
    with torch.no_grad():
        for parameter in twin.bank.parameters():
            parameter.add_(1)
    assert torch.equal(model.predict(x), wanted)
    assert not torch.equal(twin.predict(x), wanted)
    del model
    gc.collect()
    assert not torch.equal(twin.predict(x), wanted), "the twin's adapters act still"
    bare = copy.deepcopy(backbone)
    assert torch.equal(bare.features(x), backbone.features(x))
