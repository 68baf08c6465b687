"""Retrieval without training: keys, who is chosen and mixed, and what a prediction costs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cl_adapters.backbones.frozen import FrozenBackbone
from cl_adapters.bank.bank import BARE, Route
from cl_adapters.config import build
from cl_adapters.errors import ClAdaptersError, ConfigError, DataError, IncompatibleBackbone
from cl_adapters.features import FeatureMemory
from cl_adapters.model.facade import AdapterModel
from cl_adapters.parts.keys import Keys, KeysConfig, centroids
from cl_adapters.predictors import Predictor
from cl_adapters.predictors.knn_vote import KNNVote
from cl_adapters.predictors.nearest_key import NearestKey
from cl_adapters.predictors.nearest_prototype import NearestPrototype
from cl_adapters.predictors.self_refine import SelfRefine
from cl_adapters.predictors.soft_top_k import SoftTopK
from tests.models import random_model

WIDTH = 16
RETRIEVAL = (NearestKey(), KNNVote(k=3), SoftTopK(k=2), SelfRefine(start="keys"))
Make = Callable[..., AdapterModel]


@pytest.fixture
def make_model(tiny_vit: Callable[..., nn.Module]) -> Make:
    """Models of T tasks with two classes each, adapters in the given blocks, three keys per class."""

    def make(tasks: int = 3, blocks: tuple[int, ...] | None = None, depth: int = 4) -> AdapterModel:
        backbone = FrozenBackbone.wrap(tiny_vit(width=WIDTH, heads=2, img_size=16, depth=depth))
        return random_model(backbone, [[10 * task, 10 * task + 1] for task in range(tasks)], blocks=blocks)

    return make


def images(n: int = 10) -> Tensor:
    return torch.randn(n, 3, 16, 16, generator=torch.Generator().manual_seed(7))


def cosines(model: AdapterModel, x: Tensor) -> Tensor:
    """Cosine of bare features to every key, [B, M], by hand."""
    with torch.no_grad():
        f = model.backbone(x)
    keys = model.part("class_keys", Keys).keys_MD
    return torch.stack([F.cosine_similarity(row[None], keys) for row in f])


# --- keys -------------------------------------------------------------------------------------------------------------


def clustered(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Four tight clusters of 10 features each, and their centres."""
    centres = 5 * torch.randn(4, 8, generator=generator)
    return (centres.repeat_interleave(10, 0) + 0.01 * torch.randn(40, 8, generator=generator)), centres


def test_what_is_kept_of_a_class() -> None:
    draw = torch.Generator().manual_seed(0)
    f, centres = clustered(draw)
    for config, count in (
        (KeysConfig(held_out=0.25), 1),
        (KeysConfig(kind="centroids", held_out=0.25), 4),
        (KeysConfig(kind="centroids", per_class=2, held_out=0.25), 2),
        (KeysConfig(kind="features", held_out=0.25), 30),
        (KeysConfig(kind="features", per_class=7, held_out=0.25), 7),
    ):
        keys = Keys(config, 8)
        keys.add_class(f, torch.Generator().manual_seed(3))
        keys.add_class(-f, torch.Generator().manual_seed(4))
        assert keys.column_M.tolist() == [0] * count + [1] * count
        assert keys.held_out_column_H.tolist() == [0] * 10 + [1] * 10
        held = {tuple(row.tolist()) for row in keys.held_out_HD[:10]}
        assert held < {tuple(row.tolist()) for row in f}
        if config.kind == "features":
            assert not held & {tuple(row.tolist()) for row in keys.keys_MD}, "what is held out becomes no key"
        again = Keys(config, 8)
        again.add_class(f, torch.Generator().manual_seed(3))
        assert torch.equal(again.keys_MD, keys.keys_MD[:count]), "a function of features and generator"
    found = centroids(f, 4, torch.Generator().manual_seed(1))
    assert torch.cdist(centres, found).amin(1).max() < 0.05, "k-means finds the clusters"


def test_mean_key_is_the_mean_of_what_is_not_held_out() -> None:
    f = torch.arange(24.0).reshape(6, 4)
    keys = Keys(KeysConfig(held_out=0.5), 4)
    keys.add_class(f, torch.Generator().manual_seed(0))
    total = keys.keys_MD[0] * 3 + keys.held_out_HD.sum(0)
    assert torch.allclose(total, f.sum(0))
    whole = Keys(KeysConfig(held_out=0), 4)
    whole.add_class(f, torch.Generator().manual_seed(0))
    assert torch.equal(whole.keys_MD[0], f.mean(0))


def test_similarity_scores_and_means() -> None:
    keys = Keys(KeysConfig(kind="features", held_out=0), 2)
    draw = torch.Generator().manual_seed(0)
    keys.add_class(torch.tensor([[1.0, 0.0], [0.0, 2.0]]), draw)
    keys.add_class(torch.tensor([[-3.0, 0.0]]), draw)
    scores = keys.class_scores(torch.tensor([[0.0, 5.0], [-1.0, 0.0]]), classes=3)
    assert torch.allclose(scores, torch.tensor([[1.0, 0.0, -torch.inf], [0.0, 1.0, -torch.inf]]))
    assert torch.equal(keys.means(), torch.tensor([[0.5, 1.0], [-3.0, 0.0]]))


def test_more_clusters_than_different_features() -> None:
    same = torch.ones(9, 3)
    assert torch.equal(centroids(same, 4, torch.Generator().manual_seed(0)), torch.ones(1, 3))
    assert len(centroids(torch.eye(2), 4, torch.Generator().manual_seed(0))) == 2


def test_wrong_settings() -> None:
    with pytest.raises(ConfigError, match=r"keys\.kind.*'prototypes', 'centroids' or 'features'"):
        KeysConfig.of("prototype")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="got 3 for prototypes"):
        KeysConfig(per_class=3)
    with pytest.raises(ValueError, match=r"held_out must be in \[0, 1\), got 1"):
        KeysConfig(held_out=1)
    with pytest.raises(DataError, match="without training images"):
        Keys(KeysConfig(), 4).add_class(torch.empty(0, 4), torch.Generator())
    for wrong in ({"k": 0}, {"temperature": 0.0}):
        for cls in (KNNVote, SoftTopK):
            with pytest.raises(ConfigError, match="k must be at least 1 and temperature positive"):
                build(cls, wrong)


# --- predictors -------------------------------------------------------------------------------------------------------


def test_nearest_key_and_its_adapter(make_model: Make) -> None:
    model, x = make_model(), images()
    near = cosines(model, x)
    slots = model.part("class_keys", Keys).column_M[near.argmax(1)] // 2
    assert len(slots.unique()) > 1
    answer = model.answer(x, predictor=NearestKey())
    assert torch.equal(answer.adapter, slots)
    with torch.no_grad():
        wanted = model.head(model.features(x, Route.hard(slots)))
    assert torch.allclose(answer.logits, wanted, atol=1e-6)
    assert answer.passes.tolist() == [2.0] * len(x)


def test_votes_are_weighted_by_similarity(make_model: Make) -> None:
    model, x = make_model(), images()
    near = cosines(model, x)
    slot_of_key = model.part("class_keys", Keys).column_M // 2
    for k, temperature in ((1, 0.07), (5, 0.05), (18, 10.0)):
        best = near.topk(k, 1)
        votes = torch.zeros(len(x), 3)
        for row in range(len(x)):
            for value, key in zip(best.values[row].tolist(), best.indices[row].tolist(), strict=True):
                votes[row, slot_of_key[key]] += torch.tensor(value / temperature).exp()
        assert model.answer(x, predictor=KNNVote(k=k, temperature=temperature)).adapter.equal(votes.argmax(1))
    nearest = model.answer(x, predictor=NearestKey())
    assert torch.equal(model.answer(x, predictor=KNNVote(k=1)).logits, nearest.logits)
    assert not torch.equal(model.answer(x, predictor=KNNVote(k=18, temperature=10)).adapter, nearest.adapter)


def test_mixture_of_the_nearest_adapters(make_model: Make) -> None:
    model, x = make_model(), images()
    near = cosines(model, x).reshape(len(x), 3, 6).amax(2)
    best = near.topk(2, 1)
    weights = torch.zeros(len(x), 3).scatter(1, best.indices, (best.values / 0.2).softmax(1))
    with torch.no_grad():
        wanted = model.head(model.features(x, Route.soft(weights)))
    answer = model.answer(x, predictor=SoftTopK(k=2, temperature=0.2))
    assert torch.allclose(answer.logits, wanted, atol=1e-5)
    assert torch.equal(answer.adapter, best.indices[:, 0])
    assert answer.passes.tolist() == [2.0] * len(x)
    one, nearest = model.answer(x, predictor=SoftTopK(k=1)), model.answer(x, predictor=NearestKey())
    assert torch.allclose(one.logits, nearest.logits, atol=1e-5)


def test_self_refined_from_the_keys(make_model: Make) -> None:
    model, x = make_model(), images()
    o = cosines(model, x).reshape(len(x), 6, 3).amax(2)
    answer = model.answer(x, predictor=SelfRefine(start="keys", max_steps=1))
    first = o.argmax(1) // 2
    assert torch.equal(answer.adapter, first)
    with torch.no_grad():
        z = model.head(model.features(x, Route.hard(first)))
    assert torch.allclose(answer.logits, z.softmax(1) + (3 * o).softmax(1), atol=1e-5)
    assert answer.passes.tolist() == [2.0] * len(x)
    assert (model.answer(x, predictor=SelfRefine(start="keys")).passes > 2).any()
    assert SelfRefine().anchor == 0
    assert SelfRefine(start="keys").anchor == BARE


@pytest.mark.parametrize("predictor", RETRIEVAL, ids=lambda p: type(p).__name__)
def test_classes_older_than_any_adapter_are_answered_bare(make_model: Make, predictor: Predictor) -> None:
    model, x = make_model(), images(20)
    model.task_of_slot = [1, 2, 2]
    assert model.slot_of_column.tolist() == [-1, -1, 0, 0, 2, 2]
    answer = model.answer(x, predictor=predictor)
    assert set(answer.adapter.tolist()) <= {-1, 0, 2}
    assert (answer.adapter == -1).any()
    bare = answer.adapter == -1
    if isinstance(predictor, NearestKey):
        with torch.no_grad():
            assert torch.allclose(answer.logits[bare], model.head(model.backbone(x[bare])), atol=1e-5)
        assert answer.passes[bare].tolist() == [1.0] * int(bare.sum())


@pytest.mark.parametrize("predictor", RETRIEVAL, ids=lambda p: type(p).__name__)
def test_without_keys(make_model: Make, predictor: Predictor) -> None:
    model = make_model()
    del model.parts["class_keys"]
    with pytest.raises(ClAdaptersError, match="no keys to look inputs up by: train it with keys='prototypes'"):
        model.answer(images(2), predictor=predictor)


# --- late blocks ------------------------------------------------------------------------------------------------------


class Depths:
    """Images that go through each block."""

    def __init__(self, model: AdapterModel) -> None:
        blocks: Any = model.backbone.encoder.get_submodule("blocks")
        self.images = [0] * len(blocks)
        for place, block in enumerate(blocks):
            block.register_forward_hook(lambda module, args, output, place=place: self.count(place, len(output)))

    def count(self, place: int, images: int) -> None:
        self.images[place] += images


def not_resumable() -> None:
    raise IncompatibleBackbone("it cannot be entered at a block")


@pytest.mark.parametrize(
    "predictor", [*RETRIEVAL, NearestPrototype(), NearestPrototype(slot=BARE)], ids=lambda p: repr(p)[:40]
)
def test_late_adapters_share_the_pass_before_them(
    make_model: Make, predictor: Predictor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Same answers as with whole passes, and the first blocks run once per image."""
    model, x = make_model(blocks=(3,)), images()
    depths = Depths(model)
    answer = model.answer(x, predictor=predictor)
    assert depths.images[:3] == [len(x)] * 3
    assert float(answer.passes.sum()) == pytest.approx(sum(depths.images) / 4)
    if not isinstance(predictor, SelfRefine | NearestPrototype):
        assert answer.passes.tolist() == [1.25] * len(x), "one pass plus the last of four blocks"
    monkeypatch.setattr(model.backbone, "check_resumable", not_resumable)  # then passes are whole ones
    whole = model.answer(x, predictor=predictor)
    assert whole.passes.tolist() == [1 + 4 * (p - 1) for p in answer.passes.tolist()]
    assert torch.allclose(whole.logits, answer.logits, atol=1e-6)
    assert torch.equal(whole.adapter, answer.adapter)


def test_memory_and_late_adapters(make_model: Make) -> None:
    model, x = make_model(blocks=(2, 3)), images()
    plain = model.answer(x, predictor=NearestKey())
    assert plain.passes.tolist() == [1.5] * len(x)
    memory, numbers = FeatureMemory(model), list(range(len(x)))
    first = model.answer(x, memory, numbers, predictor=NearestKey())
    memory.forget(BARE)
    depths = Depths(model)
    again = model.answer(x, memory, numbers, predictor=NearestKey())
    assert depths.images == [len(x)] * 4, "adapted features were remembered"
    for answer in (first, again):
        assert torch.allclose(answer.logits, plain.logits, atol=1e-6)
        assert torch.equal(answer.passes, plain.passes), "what it costs without memory"


def test_the_mean_of_centroids_is_that_of_the_features() -> None:
    """Nine tenths around one point, one tenth far away."""
    draw = torch.Generator().manual_seed(0)
    f = torch.cat([torch.randn(90, 8, generator=draw), 30 + torch.randn(10, 8, generator=draw)])
    keys = Keys(KeysConfig(kind="centroids", per_class=2, held_out=0), 8)
    keys.add_class(f, torch.Generator().manual_seed(0))
    keys.add_class(f[:3], torch.Generator().manual_seed(0))
    keys.add_class(torch.ones(9, 8), torch.Generator().manual_seed(0))
    assert keys.size_M is not None
    assert sorted(keys.size_M.tolist()[:2]) == [10, 90]
    wanted = torch.stack([f.mean(0), f[:3].mean(0), torch.ones(8)])
    assert torch.allclose(keys.means(), wanted, atol=1e-4)
