"""A model of a pool that looks its inputs up in an index: the answers of a model that holds the keys itself."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cl_adapters.errors import ClAdaptersError, ConfigError, PoolError, StorageError
from cl_adapters.index import indexes
from cl_adapters.index.answers import Neighbours
from cl_adapters.index.calibration import calibrate
from cl_adapters.index.index import AdapterIndex
from cl_adapters.model.facade import AdapterModel
from cl_adapters.openset import calibrate as calibrate_model
from cl_adapters.openset import open_set
from cl_adapters.parts.abstention import Abstention
from cl_adapters.parts.keys import Keys, keys_of
from cl_adapters.pool import AdapterPool, PoolClass
from cl_adapters.pool.checks import adapter_of
from cl_adapters.pool.indexed_keys import IndexedKeys
from cl_adapters.predictors import Predictor
from cl_adapters.predictors.knn_vote import KNNVote
from cl_adapters.predictors.nearest_key import NearestKey
from cl_adapters.predictors.self_refine import SelfRefine
from cl_adapters.predictors.soft_top_k import SoftTopK

WIDTH = 16
RETRIEVAL = (NearestKey(), KNNVote(k=3), KNNVote(k=99), SoftTopK(k=2), SoftTopK(k=9), SelfRefine(start="keys"))
Make = Callable[..., AdapterModel]


@pytest.fixture
def pool(make_model: Make, tmp_path: Path) -> AdapterPool:
    """Four records with 2, 1, 3, 2 classes of three keys and two held-back features each."""
    return make_model().save_pool(tmp_path / "pool")


def whole_index(pool: AdapterPool, backend: str = "exact", **options: Any) -> AdapterIndex:
    """Every key of the pool."""
    return AdapterIndex.build(pool, keys="features", backend=backend, **options)


def assert_same(model: AdapterModel, other: AdapterModel, x: Tensor, predictor: Predictor) -> None:
    first, second = model.answer(x, predictor=predictor), other.answer(x, predictor=predictor)
    assert len(first.adapter.unique()) > 1
    assert torch.equal(first.adapter, second.adapter)
    assert torch.equal(first.passes, second.passes)
    assert torch.allclose(first.logits, second.logits, atol=1e-5)


@pytest.mark.parametrize("backend", [name for name in indexes.names() if indexes.get(name).exact])
@pytest.mark.parametrize("predictor", RETRIEVAL, ids=repr)
def test_the_answers_of_the_keys_themselves(pool: AdapterPool, x: Tensor, backend: str, predictor: Predictor) -> None:
    keys = AdapterModel.from_pool(pool)
    indexed = AdapterModel.from_pool(pool, index=whole_index(pool, backend))
    assert isinstance(indexed.parts["class_keys"], IndexedKeys)
    assert_same(keys, indexed, x, predictor)
    twin = copy.deepcopy(indexed)
    assert torch.equal(twin.predict(x, predictor=predictor), indexed.predict(x, predictor=predictor))


@pytest.mark.parametrize("backend", indexes.names())
def test_well_separated_classes_are_found_by_every_back_end(
    make_model: Make, x: Tensor, tmp_path: Path, backend: str
) -> None:
    model = make_model()
    keys = model.part("class_keys", Keys)
    with torch.no_grad():
        f = model.backbone(x)[: keys.num_classes]
    draw = torch.Generator().manual_seed(3)
    keys.keys_MD = f[keys.column_M] * (1 + 0.001 * torch.randn(len(keys.column_M), WIDTH, generator=draw))
    pool = model.save_pool(tmp_path / "separate")
    indexed = AdapterModel.from_pool(pool, index=whole_index(pool, backend))
    for predictor in (NearestKey(), KNNVote(k=3), SoftTopK(k=1)):
        assert_same(AdapterModel.from_pool(pool), indexed, x[: keys.num_classes], predictor)


@pytest.mark.parametrize("predictor", RETRIEVAL, ids=repr)
def test_only_the_model_s_records_are_found(pool: AdapterPool, x: Tensor, predictor: Predictor) -> None:
    chosen, index = ["task-000", "task-002"], whole_index(pool)
    indexed = AdapterModel.from_pool(pool, chosen, index=index)
    assert_same(AdapterModel.from_pool(pool, chosen), indexed, x, predictor)
    whole = AdapterModel.from_pool(pool, index=index)
    before = whole.predict(x, predictor=predictor)
    tensors, knowledge = pool.tensors("task-001"), pool.knowledge("task-001")
    with torch.no_grad():
        knowledge["keys"] = whole.backbone(x)  # nearer than any other
    knowledge["key_class"] = torch.zeros(len(x), dtype=torch.long)
    pool.add(tensors, adapter_of(pool.get("task-001")), [PoolClass(label=5)], id="later", knowledge=knowledge)
    index.refresh()
    assert "later" in index.records
    assert torch.allclose(whole.predict(x, predictor=predictor), before, atol=1e-6), "made before there was another"


def test_no_batch_meets_every_key(pool: AdapterPool, x: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is asked of the index: k for a vote, a few for a mixture, until enough adapters are among them."""
    index = whole_index(pool)
    model = AdapterModel.from_pool(pool, index=index)
    asked: list[tuple[int, int]] = []
    real = index.search_features

    def search(f_BD: Tensor, k: int, **options: Any) -> Neighbours:
        asked.append((len(f_BD), k))
        return real(f_BD, k, **options)

    monkeypatch.setattr(index, "search_features", search)
    for predictor, wanted in ((NearestKey(), [(24, 1)]), (KNNVote(k=3), [(24, 3)])):
        asked.clear()
        model.answer(x, predictor=predictor)
        assert asked == wanted
    asked.clear()
    model.answer(x, predictor=SoftTopK(k=2))
    assert asked[0] == (24, 8)
    assert all(rows < 24 for rows, _ in asked[1:]), "further only for those that have too few"
    monkeypatch.setattr("cl_adapters.pool.indexed_keys.LOOKED_AT", 1)
    scores = keys_of(model).class_scores(model.backbone(x), 9)
    assert scores.isfinite().sum(1).tolist() == [1] * len(x)
    monkeypatch.setattr("cl_adapters.pool.indexed_keys.MOST", 8)
    asked.clear()
    model.answer(x, predictor=SoftTopK(k=2))
    assert len(asked) == 1


def test_the_threshold_of_the_index_counts(make_model: Make, x: Tensor, tmp_path: Path) -> None:
    model = make_model(predictor=NearestKey())
    calibrate_model(model, false_reject=0.3)
    pool = model.save_pool(tmp_path / "pool")
    index = whole_index(pool)
    assert AdapterModel.from_pool(pool).answer(x).abstained is not None, "that of the pool"
    assert AdapterModel.from_pool(pool, index=index).answer(x).abstained is None, "the index has none"
    calibrate(index, 0.3)
    with_index = AdapterModel.from_pool(pool, index=index)
    assert with_index.part("abstention", Abstention).similarity == index.threshold
    first, second = AdapterModel.from_pool(pool).answer(x), with_index.answer(x)
    assert first.abstained is not None
    assert second.abstained is not None
    assert 0 < int(first.abstained.sum()) < len(x)
    assert torch.equal(first.abstained, second.abstained), "the same keys and held-back features, so the same threshold"
    assert torch.allclose(first.logits, second.logits, atol=1e-5), "refused ones by the same class means"
    index.threshold = 2.0
    assert AdapterModel.from_pool(pool, index=index).answer(x).abstained.all()  # type: ignore[union-attr]
    assert torch.equal(with_index.answer(x).abstained, second.abstained), "the threshold at that moment"  # type: ignore[arg-type]
    y = torch.full((len(x),), 90)
    assert open_set(with_index, [(x, y)], [x]).auroc == 0.5
    with pytest.raises(ClAdaptersError, match=r"calibrate that one with cl_adapters\.index\.calibration\.calibrate"):
        calibrate_model(with_index, false_reject=0.3)


def test_metrics_and_saved_indexes(pool: AdapterPool, x: Tensor, tmp_path: Path) -> None:
    metric: Any
    for metric in ("l2", "mahalanobis"):
        index = whole_index(pool, metric=metric)
        index.save(tmp_path / metric)
        wanted = [hits[0].record for hits in index.query(x, 1)]
        model = AdapterModel.from_pool(pool, index=tmp_path / metric)
        found = model.answer(x, predictor=NearestKey()).adapter.tolist()
        assert [pool.ids[slot] for slot in found] == wanted
    AdapterIndex.build(pool, backend="exact").save()
    calibrated = whole_index(pool)
    calibrate(calibrated, 0.3)
    calibrated.save(pool.path / "index" / "other")
    for name, threshold in (("default", None), ("other", calibrated.threshold)):
        model = AdapterModel.from_pool(pool.path, backbone=pool.backbone, index=name)
        keys = keys_of(model)
        assert isinstance(keys, IndexedKeys)
        assert keys.index.threshold == threshold
        assert ("abstention" in model.parts) == (threshold is not None)
    with pytest.raises(StorageError, match="there is no index at"):
        AdapterModel.from_pool(pool, index="none")


def test_an_index_that_does_not_fit(pool: AdapterPool, make_model: Make, x: Tensor, tmp_path: Path) -> None:
    other = make_model().save_pool(tmp_path / "twin")
    with pytest.raises(PoolError, match=r"this index is of the pool at .*twin"):
        AdapterModel.from_pool(pool, index=whole_index(other))
    pool.tag("task-000", add=["one"])
    part = whole_index(pool, tags=["one"])
    with pytest.raises(PoolError, match=r"does not have adapter 'task-001': refresh\(\) it"):
        AdapterModel.from_pool(pool, index=part)
    assert AdapterModel.from_pool(pool, ["task-000"], index=part, predictor=NearestKey()).classes == [100, 101]
    index = whole_index(pool)
    model = AdapterModel.from_pool(pool, index=index, predictor=NearestKey())
    knowledge = pool.knowledge("task-001") | {"keys": -pool.knowledge("task-001")["keys"]}
    pool.replace(pool.get("task-001"), knowledge=knowledge)
    with pytest.raises(PoolError, match="has old keys of adapter 'task-001'"):
        AdapterModel.from_pool(pool, index=index)
    index.refresh()
    AdapterModel.from_pool(pool, index=index)
    index.remove(pool.ids)
    with pytest.raises(ClAdaptersError, match="no key of this model's classes any more"):
        model.predict(x)


def test_such_a_model_is_kept_as_pool_and_index(pool: AdapterPool, tmp_path: Path) -> None:
    model = AdapterModel.from_pool(pool, index=whole_index(pool))
    for save in (model.save, model.save_pool):
        with pytest.raises(
            ClAdaptersError, match=r"keep the pool and use AdapterModel\.from_pool\(pool, index=\.\.\.\)"
        ):
            save(tmp_path / "saved")
        assert not (tmp_path / "saved").exists()


@pytest.mark.parametrize("cls", [KNNVote, SoftTopK])
def test_the_temperature_of_cosines_is_for_cosines(pool: AdapterPool, x: Tensor, cls: Any) -> None:
    model = AdapterModel.from_pool(pool, index=whole_index(pool, metric="l2"))
    with pytest.raises(ConfigError, match=r"temperature 0\.07 is for cosines, but the index scores by 'l2'"):
        model.answer(x, predictor=cls(k=3))
    model.answer(x, predictor=cls(k=3, temperature=20.0))
    one, nearest = model.answer(x, predictor=cls(k=1)), model.answer(x, predictor=NearestKey())
    assert torch.equal(one.adapter, nearest.adapter), "one alone is not weighed"


def test_places_of_records_beside_a_change_in_another_thread(pool: AdapterPool, x: Tensor) -> None:
    """What was looked at is used, though another thread has put its own in the same place."""

    class Raced(IndexedKeys):
        def __setattr__(self, name: str, value: Any) -> None:
            super().__setattr__(name, value)
            if name == "_seen" and value is not None:  # at once another thread does the same for another state
                super().__setattr__(name, ((), torch.full_like(value[1], -2)))  # type: ignore[arg-type]

    model = AdapterModel.from_pool(pool, index=whole_index(pool))
    keys = keys_of(model)
    assert isinstance(keys, IndexedKeys)
    with torch.no_grad():
        f = model.backbone(x)
    wanted = keys.nearest(f, 3)
    found = Raced(keys.index, keys.records, keys.means_CD).nearest(f, 3)
    assert torch.equal(found[1], wanted[1])
