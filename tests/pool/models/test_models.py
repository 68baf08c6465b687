"""A model as a pool and back: same answers, one adapter at a time in memory, and a record less is its classes less."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from cl_adapters.adapters.bottleneck import Bottleneck
from cl_adapters.backbones.frozen import FrozenBackbone
from cl_adapters.bank.bank import BARE, AdapterBank
from cl_adapters.errors import PoolError, StorageError, UnknownName
from cl_adapters.model.facade import AdapterModel
from cl_adapters.openset import calibrate
from cl_adapters.parts.keys import Keys
from cl_adapters.pool import AdapterPool, PoolClass
from cl_adapters.predictors import Predictor
from cl_adapters.predictors.fixed import Fixed
from cl_adapters.predictors.knn_vote import KNNVote
from cl_adapters.predictors.max_ensemble import MaxEnsemble
from cl_adapters.predictors.mixture import MixtureOfAdapters
from cl_adapters.predictors.nearest_key import NearestKey
from cl_adapters.predictors.nearest_prototype import NearestPrototype
from cl_adapters.predictors.ridge import RidgeClassifier
from cl_adapters.predictors.self_refine import SelfRefine
from cl_adapters.predictors.soft_top_k import SoftTopK

WIDTH = 16
PREDICTORS = (NearestKey(), KNNVote(k=3), SoftTopK(k=2), SelfRefine(), SelfRefine(start="keys"), NearestPrototype())
Make = Callable[..., AdapterModel]


def alone(model: AdapterModel, x: Tensor) -> Tensor:
    """Logits image by image: then no image shares a matrix product with another."""
    return torch.cat([model.predict(row[None]) for row in x])


@pytest.mark.parametrize("predictor", PREDICTORS, ids=lambda p: repr(p)[:40])
def test_round_trip(make_model: Make, predictor: Predictor, x: Tensor, tmp_path: Path) -> None:
    model = make_model(predictor=predictor)
    calibrate(model, false_reject=0.2)
    pool = model.save_pool(tmp_path / "pool", tags=["mos"], benchmark="noise", metrics={1: {"accuracy": 97.5}})
    assert pool.verify().ok
    assert pool.ids == ("task-000", "task-001", "task-002", "task-003")
    assert [record.labels for record in pool.records] == [(100, 101), (90,), (80, 81, 82), (70, 71)]
    assert pool.records[3].parents == pool.ids[:3]
    assert pool.records[3].merge == {"method": "ema", "momentum": 0.1, "head": "aligned"}
    assert pool.records[1].metrics == {"accuracy": 97.5}
    assert {(record.tags, record.benchmark, record.task) for record in pool.records} == {
        (("mos",), "noise", task) for task in range(4)
    }
    loaded = AdapterModel.from_pool(tmp_path / "pool", backbone=model.backbone)
    assert loaded.classes == model.classes
    assert loaded.class_names == model.class_names
    assert loaded.predictor == predictor
    assert loaded.record_of_slot == pool.ids
    assert loaded.origins == model.origins
    first, second = model.answer(x), loaded.answer(x)
    assert torch.allclose(first.logits, second.logits, atol=1e-5)
    assert torch.equal(first.adapter, second.adapter)
    assert torch.equal(first.passes, second.passes)
    assert first.abstained is not None
    assert second.abstained is not None
    assert torch.equal(first.abstained, second.abstained)
    again = loaded.save_pool(tmp_path / "again")
    assert [dataclasses.replace(record, tags=("mos",), benchmark="noise", created="") for record in again.records] == [
        dataclasses.replace(record, created="", metrics={}) for record in pool.records
    ], "the same content, hashes included"


def test_models_without_adapters(backbone: FrozenBackbone, x: Tensor, tmp_path: Path) -> None:
    """SimpleCIL: a record per task, whose prototypes are keys."""
    model = AdapterModel(backbone)
    for task in range(3):
        model.add_task([task, 10 + task])
        model.prototypes.append(torch.randn(2, WIDTH, generator=torch.Generator().manual_seed(task)))
    pool = model.save_pool(tmp_path / "pool")
    assert [record.adapter for record in pool.records] == [None] * 3
    loaded = AdapterModel.from_pool(pool)
    assert loaded.bank is None
    for predictor in (None, NearestKey()):
        assert torch.allclose(loaded.predict(x, predictor=predictor), model.predict(x), atol=1e-6)
    pool.remove("task-001")
    assert torch.equal(AdapterModel.from_pool(pool).predict(x), loaded.predict(x)[:, [0, 1, 4, 5]])


def test_bare_records_beside_adapters(make_model: Make, x: Tensor, tmp_path: Path) -> None:
    model = make_model(predictor=NearestKey())
    model.task_of_slot = [1, 1, 2, 3]
    model.origins = {}
    pool = model.save_pool(tmp_path / "pool")
    assert [(record.adapter is None, len(record.classes)) for record in pool.records] == [
        (True, 2), (False, 0), (False, 1), (False, 3), (False, 2)
    ]  # fmt: skip
    loaded = AdapterModel.from_pool(pool)
    first, second = model.answer(x), loaded.answer(x)
    assert (first.adapter == BARE).any()
    assert torch.allclose(first.logits, second.logits, atol=1e-6)
    assert torch.equal(first.adapter + 1, second.adapter), "the bare record is a slot that adds nothing"


@pytest.mark.parametrize("predictor", PREDICTORS[:2], ids=lambda p: type(p).__name__)
def test_a_record_less(make_model: Make, predictor: Predictor, x: Tensor, tmp_path: Path) -> None:
    """Its columns are gone; images that had chosen another record get the same bits."""
    model = make_model(predictor=predictor)
    pool = model.save_pool(tmp_path / "pool")
    loaded = AdapterModel.from_pool(pool)
    whole, logits = loaded.answer(x), alone(loaded, x)
    others = whole.adapter != 1
    assert 0 < int(others.sum()) < len(x)
    pool.remove("task-001")
    less = AdapterModel.from_pool(pool)
    assert less.classes == [100, 101, 80, 81, 82, 70, 71]
    if isinstance(predictor, KNNVote):  # another key takes the place of one that voted
        votes = model.part("class_keys", Keys).similarity(model.backbone(x)).topk(3, 1).indices
        others &= ~(model.part("class_keys", Keys).column_M[votes] == 2).any(1)
        assert others.any()
    assert torch.equal(alone(less, x)[others], logits[others][:, [0, 1, 3, 4, 5, 6, 7]])
    chosen = AdapterModel.from_pool(tmp_path / "pool", ["task-003", "task-000"], backbone=model.backbone)
    assert chosen.classes == [100, 101, 70, 71], "in the order of the pool"


def test_a_predictor_whose_own_adapter_moves_or_is_missing(make_model: Make, x: Tensor, tmp_path: Path) -> None:
    model = make_model(predictor=Fixed(slot=2))
    pool = model.save_pool(tmp_path / "pool")
    loaded = AdapterModel.from_pool(pool, ["task-001", "task-002", "task-003"])
    assert loaded.predictor == Fixed(slot=1)
    assert torch.allclose(loaded.predict(x), model.predict(x)[:, 2:], atol=1e-6)
    pool.rename("task-002", "mine")
    assert AdapterModel.from_pool(pool).predictor == Fixed(slot=2), "known by its content"
    refined = make_model().save_pool(tmp_path / "refined")
    refined.remove("task-000")
    with pytest.raises(PoolError, match=r"'self_refine' needs adapter 'task-000'.*pass predictor=NearestKey"):
        AdapterModel.from_pool(refined)
    assert AdapterModel.from_pool(refined, predictor=SelfRefine(start="keys")).predict(x).shape == (len(x), 6)


def test_a_whole_copy_predicts_alike(make_model: Make, x: Tensor, tmp_path: Path) -> None:
    model = make_model()
    calibrate(model, false_reject=0.2)
    pool = model.save_pool(tmp_path / "pool")
    other = AdapterPool.create(tmp_path / "other", model.backbone)
    assert len(pool.copy_to(other)) == 4
    loaded, whole = AdapterModel.from_pool(other), AdapterModel.from_pool(pool)
    assert loaded.predictor == SelfRefine()
    assert torch.equal(loaded.predict(x), whole.predict(x))
    assert torch.equal(loaded.answer(x).abstained, whole.answer(x).abstained)  # type: ignore[arg-type]
    assert other.verify().ok
    (other.path / "model.json").unlink()
    assert pool.copy_to(other) == ()
    assert AdapterModel.from_pool(other).predictor == SelfRefine(), "copied again"


def test_a_rule_is_not_copied_where_it_does_not_belong(make_model: Make, tmp_path: Path) -> None:
    model = make_model()
    pool = model.save_pool(tmp_path / "pool")
    part, mixed, ruled = (AdapterPool.create(tmp_path / name, model.backbone) for name in ("part", "mixed", "ruled"))
    pool.copy_to(part, ["task-001", "task-002"])
    mixed.add({}, None, [PoolClass(label=1)], id="own")
    pool.copy_to(mixed)
    make_model(predictor=NearestPrototype()).save_pool(tmp_path / "source").copy_to(ruled)
    before = (ruled.path / "model.json").read_bytes()
    for id in ruled.ids:
        ruled.remove(id)
    pool.copy_to(ruled)
    for target in (part, mixed):
        assert not (target.path / "model.json").exists()
    assert (ruled.path / "model.json").read_bytes() == before
    assert AdapterModel.from_pool(ruled).predictor == NearestPrototype()
    assert AdapterModel.from_pool(part).predictor == NearestKey(), "the default"
    (pool.path / "model.json").write_text("{")
    empty = AdapterPool.create(tmp_path / "empty", model.backbone)
    with pytest.raises(PoolError, match="cannot be read as JSON"):
        pool.copy_to(empty)
    assert len(empty) == 0
    assert not (empty.path / "model.json").exists()


def test_without_the_saved_predictor(make_model: Make, x: Tensor, tmp_path: Path) -> None:
    """A pool that was put together by hand."""
    model = make_model()
    pool = model.save_pool(tmp_path / "pool")
    other = AdapterPool.create(tmp_path / "other", model.backbone)
    for id in pool.ids:
        other.import_from(pool.export_to(tmp_path / id, id))
    loaded = AdapterModel.from_pool(other)
    assert loaded.predictor == NearestKey()
    assert torch.allclose(loaded.predict(x), model.predict(x, predictor=NearestKey()), atol=1e-5)
    for content, message in ((b"{", "cannot be read as JSON"), (b'{"schema_version": 9}', "not of schema 1")):
        (tmp_path / "pool" / "model.json").write_bytes(content)
        with pytest.raises(PoolError, match=message):
            AdapterModel.from_pool(pool)
    (tmp_path / "pool" / "model.json").write_bytes(b'{"schema_version": 1, "predictor": {"type": "os"}}')
    with pytest.raises(PoolError, match=r"predictor in model\.json cannot be used"):
        AdapterModel.from_pool(pool)


@pytest.mark.parametrize("predictor", [MixtureOfAdapters(), MaxEnsemble(), RidgeClassifier()])
def test_models_that_are_no_set_of_adapters(make_model: Make, predictor: Predictor, tmp_path: Path) -> None:
    with pytest.raises(PoolError, match=r"cannot be a pool: its answers need all its parts. Keep it with model\.save"):
        make_model(predictor=predictor).save_pool(tmp_path / "pool")
    assert not (tmp_path / "pool").exists()


def test_records_that_make_no_model(make_model: Make, tmp_path: Path) -> None:
    model = make_model()
    pool = model.save_pool(tmp_path / "pool")
    with pytest.raises(StorageError, match="exists already"):
        model.save_pool(tmp_path / "pool")
    with pytest.raises(UnknownName, match="did you mean 'task-001'"):
        AdapterModel.from_pool(pool, ["task-01"])
    assert model.bank is not None
    tensors, adapter = model.bank.export(0), model.bank.adapter
    pool.add(tensors, adapter, [PoolClass(label=90)], id="twice")
    with pytest.raises(PoolError, match="class 90 belongs to 'task-001' and to 'twice'"):
        AdapterModel.from_pool(pool)
    pool.add(tensors, adapter, [PoolClass(label=5)], id="bald")
    with pytest.raises(PoolError, match=r"'bald' has no 'head.weight', others have"):
        AdapterModel.from_pool(pool, ["task-001", "bald"])
    other = Bottleneck(bottleneck=2)
    small = AdapterBank(model.backbone, other).fresh(torch.Generator().manual_seed(0))
    pool.add(small, other, [PoolClass(label=6)], id="small")
    with pytest.raises(PoolError, match="adapters of one type with the same options"):
        AdapterModel.from_pool(pool, ["task-001", "small"])
    with pytest.raises(PoolError, match="no adapter with classes"):
        AdapterModel.from_pool(pool, [])
