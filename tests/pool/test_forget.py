"""Forgetting: no byte of it is left in the pool's folder, every other byte is as it was, and what remains is named."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from cl_adapters.backbones.frozen import FrozenBackbone
from cl_adapters.errors import PoolError, StorageError, UnknownName
from cl_adapters.index.calibration import calibrate
from cl_adapters.index.index import AdapterIndex
from cl_adapters.model.facade import AdapterModel
from cl_adapters.pool import AdapterPool
from cl_adapters.pool.forget import forget
from cl_adapters.pool.merging import merge_records
from cl_adapters.pool.record import record_to_plain
from cl_adapters.predictors.nearest_key import NearestKey
from cl_adapters.predictors.self_refine import SelfRefine
from tests.models import random_model

WIDTH = 16


@pytest.fixture
def pool(tiny_vit: Callable[..., nn.Module], tmp_path: Path) -> AdapterPool:
    """Three tasks of three classes; each adapter was made of those before, the first of none; an index beside them."""
    backbone = FrozenBackbone.wrap(tiny_vit(width=WIDTH, heads=2, img_size=16, depth=2))
    labels = [[3 * task, 3 * task + 1, 3 * task + 2] for task in range(3)]
    model = random_model(backbone, labels, held_out=0.5, keys_per_class=6, merged=True)
    model.predictor = SelfRefine()
    made = model.save_pool(tmp_path / "pool")
    AdapterIndex.build(made, keys="features", backend="exact").save()
    return made


def contents(pool: AdapterPool) -> dict[str, bytes]:
    """Every file of the pool by its path."""
    return {str(p.relative_to(pool.path)): p.read_bytes() for p in sorted(Path(pool.path).rglob("*")) if p.is_file()}


def traces(pool: AdapterPool, tensors: Iterable[Tensor]) -> list[str]:
    """Files that have the bytes of a row of one of these tensors, as it is or as the index keeps it."""
    rows = [row for value in tensors for row in value.reshape(-1, value.shape[-1])]
    wanted = [row.numpy().astype(np.float32).tobytes() for row in rows]
    wanted += [(row / row.norm()).numpy().tobytes() for row in rows if len(row) == WIDTH]
    return [name for name, content in contents(pool).items() if any(needle in content for needle in wanted)]


def test_an_adapter(pool: AdapterPool) -> None:
    own = [*pool.tensors("task-001").values()]
    knowledge = pool.knowledge("task-001")
    own += [knowledge[key] for key in ("keys", "head.weight", "prototypes", "held_out")]
    before = contents(pool)
    assert len(traces(pool, own)) == 3, "adapter, knowledge and index; else this test sees nothing"
    record, others = pool.get("task-001"), [pool.get(id) for id in ("task-000", "task-002")]
    early = AdapterPool.open(pool.path, backbone=pool.backbone)  # another reader, with everything in memory
    assert early.tensors("task-001")
    found = forget(pool, "task-001")
    assert found.removed[0].startswith("adapter 'task-001' (")
    assert "class 3, class 4, class 5" in found.removed[0]
    assert not traces(pool, own)
    after = contents(pool)
    assert before.keys() - after.keys() == set(record.files)
    changed = {name for name in after if after[name] != before.get(name)}
    assert all(name == "manifest.json" or name.startswith("index/") for name in changed)
    assert after["model.json"] == before["model.json"], "predictor, thresholds, kind of keys"
    for other in others:
        assert {name: after[name] for name in other.files} == {name: before[name] for name in other.files}
    assert [record_to_plain(other) for other in others] == json.loads(after["manifest.json"])["records"]
    for reader in (pool, early):
        assert reader.verify().ok
        assert not reader.verify().orphans
        assert reader.records == tuple(others)
        for read in (reader.tensors, reader.knowledge, reader.get):
            with pytest.raises(UnknownName):
                read("task-001")
    index = AdapterIndex.open(None, pool)
    assert index.records == ("task-000", "task-002")
    assert not index.changes()
    loaded = AdapterModel.from_pool(pool)
    assert loaded.classes == [0, 1, 2, 6, 7, 8]
    told = "\n".join(found.cannot_undo)
    assert "'task-002' started from or was merged with 'task-001' (method ema, momentum 0.1" in told
    assert "'task-000' started" not in told
    assert "linear head's rows of all other classes were aligned together with samples of adapter 'task-001'" in told


def test_the_adapter_that_a_predictor_needs(pool: AdapterPool) -> None:
    found = forget(pool, "task-000")
    told = "\n".join(found.cannot_undo)
    assert "prototypes were taken under 'task-000'; without it this pool's predictor 'self_refine' cannot run" in told
    assert "adapter 'task-001' started from" in told
    assert "adapter 'task-002' started from" in told
    assert AdapterModel.from_pool(pool, predictor=NearestKey()).classes == [3, 4, 5, 6, 7, 8]


def test_the_newest_adapter_leaves_a_trace_in_the_head_only(pool: AdapterPool) -> None:
    found = forget(pool, "task-002")
    assert len(found.cannot_undo) == 1
    assert "aligned together" in found.cannot_undo[0]


def test_killed_on_the_way(pool: AdapterPool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The indexes go first, so the request can be repeated as long as anything of it is there."""

    def kill(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    knowledge = pool.knowledge("task-001")
    with monkeypatch.context() as patch:
        patch.setattr(AdapterPool, "remove", kill)
        with pytest.raises(KeyboardInterrupt):
            forget(pool, "task-001")
    assert traces(pool, [knowledge["keys"]]) == [pool.get("task-001").files[1]], "in no index any more"
    with monkeypatch.context() as patch:
        patch.setattr(AdapterPool, "replace", kill)
        with pytest.raises(KeyboardInterrupt):
            forget(pool, 4)
    forget(pool, "task-001")
    assert not traces(pool, [knowledge["keys"]])
    assert not AdapterIndex.open(None, pool).changes()


def test_an_index_that_can_be_neither_made_anew_nor_deleted(pool: AdapterPool, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    (pool.path / "index" / "default" / "index.json").write_text("{")
    monkeypatch.setattr("shutil.rmtree", refuse)
    with pytest.raises(StorageError, match=r"index/default can be neither made anew nor deleted: Permission denied"):
        forget(pool, "task-001")
    assert "task-001" in pool, "nothing was changed"


def test_an_adapter_that_was_merged(pool: AdapterPool) -> None:
    """The merged adapter has rows of the same classes, which are named, and go by label."""
    keys = pool.knowledge("task-001")["keys"]
    merge_records(pool, ["task-001", "task-002"], id="both")
    told = forget(pool, "task-001").cannot_undo
    assert "adapter 'both' knows class 3, class 4, class 5 too, by keys and rows of its own: forget the class" in told
    assert len(traces(pool, [keys])) == 2
    for label in (3, 4, 5):
        forget(pool, label)
    assert not traces(pool, [keys])


def test_a_class(pool: AdapterPool) -> None:
    knowledge, adapter = pool.knowledge("task-001"), pool.tensors("task-001")
    mine, held = knowledge["key_class"] == 1, knowledge["held_out_class"] == 1
    own = [knowledge["keys"][mine], knowledge["held_out"][held]]
    own += [knowledge[key][[1]] for key in ("head.weight", "prototypes")]
    before = contents(pool)
    assert len(traces(pool, own)) == 2
    early = AdapterPool.open(pool.path, backbone=pool.backbone)
    assert early.knowledge("task-001").keys() == knowledge.keys()
    x = torch.randn(6, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    whole = AdapterModel.from_pool(pool, predictor=NearestKey())
    found = forget(pool, 4)
    assert found.removed[0].startswith("class 4 of adapter 'task-001'")
    assert not traces(pool, own)
    assert pool.get("task-001").labels == (3, 5)
    left = pool.knowledge("task-001")
    for key in ("head.weight", "head.bias", "prototypes"):
        assert torch.equal(left[key], knowledge[key][[0, 2]])
    assert torch.equal(left["keys"], knowledge["keys"][~mine])
    assert torch.equal(left["held_out"], knowledge["held_out"][~held])
    assert left["key_class"].tolist() == [0, 0, 0, 1, 1, 1]
    assert left["held_out_class"].tolist() == [0, 0, 0, 1, 1, 1]
    assert all(torch.equal(value, adapter[key]) for key, value in pool.tensors("task-001").items())
    after, kept = contents(pool), pool.get("task-001")
    assert kept.adapter_sha is not None
    rewritten = {"manifest.json", *kept.files[1:], *(name for name in after if name.startswith("index/"))}
    assert {name for name in after if after[name] != before.get(name)} <= rewritten
    assert len(before.keys() - after.keys()) == 1, "the old knowledge"
    for id in ("task-000", "task-002"):
        assert all(after[name] == before[name] for name in pool.get(id).files)
    assert early.get("task-001").labels == (3, 5)
    assert early.knowledge("task-001").keys() == left.keys()
    assert pool.verify().ok
    hits = AdapterIndex.open(None, pool).query(own[0], 50)
    assert {hit.label for row in hits for hit in row} == {0, 1, 2, 3, 5, 6, 7, 8}
    model = AdapterModel.from_pool(pool, predictor=NearestKey())
    assert model.classes == [0, 1, 2, 3, 5, 6, 7, 8]
    others = whole.answer(x).adapter != 1
    assert others.any()
    first, second = whole.predict(x)[others][:, [0, 1, 2, 6, 7, 8]], model.predict(x)[others][:, [0, 1, 2, 5, 6, 7]]
    assert torch.allclose(first, second, atol=1e-5)
    told = "\n".join(found.cannot_undo)
    assert "adapter 'task-001' was trained on images of class 4 together with its other classes" in told
    assert "adapter 'task-002' started from or was merged with 'task-001'" in told


def test_the_last_class_takes_its_record_along(pool: AdapterPool) -> None:
    for label in (6, 7):
        forget(pool, label)
    assert pool.get("task-002").labels == (8,)
    assert forget(pool, 8).removed[0].startswith("adapter 'task-002'")
    assert pool.ids == ("task-000", "task-001")


def test_thresholds_that_knew_it_are_named(pool: AdapterPool) -> None:
    index = AdapterIndex.open(None, pool)
    calibrate(index, 0.2)
    index.save()
    AdapterIndex.build(pool, backend="exact").save(pool.path / "index" / "bare")
    for target, what in ((4, "class 4"), ("task-002", "adapter 'task-002'")):
        told = [line for line in forget(pool, target).cannot_undo if "threshold" in line]
        assert told == [f"the threshold of index 'default' was calibrated when {what} was known; calibrate it again"]
    assert AdapterIndex.open(None, pool).threshold == index.threshold


def test_an_index_that_cannot_be_made_anew_goes(pool: AdapterPool) -> None:
    (Path(pool.path) / "index" / "default" / "index.json").write_text("{")
    found = forget(pool, "task-001")
    assert "index 'default', which could not be made anew: build it again" in found.removed
    assert not (Path(pool.path) / "index" / "default").exists()


def test_what_is_not_there(pool: AdapterPool) -> None:
    before = contents(pool)
    with pytest.raises(UnknownName, match="did you mean 'task-001'"):
        forget(pool, "task-01")
    with pytest.raises(UnknownName, match="unknown class label '9'"):
        forget(pool, 9)
    assert contents(pool) == before


# --- others who use the pool ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["task-001", 4])
def test_an_index_from_before_does_not_bring_it_back(pool: AdapterPool, target: str | int) -> None:
    """Neither one that was opened before, nor one whose keys were read before."""
    knowledge = pool.knowledge("task-001")
    own = [knowledge["keys"][knowledge["key_class"] == 1]]
    other = AdapterPool.open(pool.path, backbone=pool.backbone)
    before = [AdapterIndex.open(None, other), AdapterIndex.build(other, keys="features", backend="exact")]
    forget(pool, target)
    for index in before:
        with pytest.raises(
            StorageError, match=r"the pool has lost task-001, or has other keys of it; call refresh\(\)"
        ):
            index.save()
        with pytest.raises(StorageError, match="call refresh"):
            index.save(pool.path.parent / "elsewhere")
        assert not traces(pool, own)
        index.refresh()
        index.save()
        assert not traces(pool, own)
        assert not AdapterIndex.open(None, pool).changes()
    assert pool.verify().ok


@pytest.mark.parametrize("target", ["task-001", 4])
def test_verify_tells_of_an_index_that_has_it_still(pool: AdapterPool, target: str | int, tmp_path: Path) -> None:
    place = pool.path / "index" / "default"
    shutil.copytree(place, tmp_path / "copy")
    forget(pool, target)
    assert pool.verify().ok
    shutil.copytree(tmp_path / "copy", pool.path / "index" / "backup")
    found = pool.verify()
    assert not found.ok
    (problem,) = found.problems
    assert problem.startswith("index 'backup' holds keys that the pool does not have, of 'task-001': build it again")
    (pool.path / "index" / "backup" / "index.json").write_text("{")
    (problem,) = pool.verify().problems
    assert problem.startswith("index 'backup' cannot be read")


def test_only_indexes_are_touched(pool: AdapterPool) -> None:
    """Another folder stays; what a writer left who was killed while he saved an index goes."""
    keys, folder = pool.knowledge("task-001")["keys"], pool.path / "index"
    (folder / "notes").mkdir()
    (folder / "notes" / "todo.txt").write_text("buy milk")
    left = shutil.copytree(folder / "default", folder / ".default.0123abcd")
    (left / "index.json").unlink()  # written last
    found = forget(pool, "task-001")
    assert (folder / "notes" / "todo.txt").read_text() == "buy milk"
    assert sorted(path.name for path in folder.iterdir()) == ["default", "notes"]
    assert "folder '.default.0123abcd' of an index, left by a writer that was killed" in found.removed
    assert not traces(pool, [keys])


def test_nobody_else_writes_meanwhile(pool: AdapterPool, monkeypatch: pytest.MonkeyPatch) -> None:
    other, refused = AdapterPool.open(pool.path, backbone=pool.backbone, timeout=0.05), []

    def write(change: Callable[[], object]) -> None:
        with pytest.raises(PoolError, match="another process is writing"):
            change()
        refused.append(change)

    real = AdapterPool.remove

    def remove(self: AdapterPool, id: str) -> None:
        index = AdapterIndex.open(None, other, stale="ignore")
        for change in (index.save, partial(other.tag, "task-000", ["late"])):
            worker = threading.Thread(target=write, args=(change,))
            worker.start()
            worker.join(30)
        real(self, id)

    monkeypatch.setattr(AdapterPool, "remove", remove)
    forget(pool, "task-001")
    assert len(refused) == 2
    assert other.tag("task-000", ["late"]).tags == ("late",), "the lock is free again"


def test_beside_a_writer_that_makes_the_index_again_and_again(pool: AdapterPool) -> None:
    own = [pool.knowledge(f"task-00{task}")["keys"] for task in (1, 2)]
    stop, saved, wrong = threading.Event(), threading.Event(), []

    def rebuild() -> None:
        other = AdapterPool.open(pool.path, backbone=pool.backbone)
        while not stop.is_set():
            try:
                AdapterIndex.build(other, keys="features", backend="exact").save()
                saved.set()
            except (StorageError, UnknownName):
                pass  # a record was forgotten while its keys were read
            except BaseException as error:
                wrong.append(error)
                raise

    worker = threading.Thread(target=rebuild)
    worker.start()
    try:
        for target in (3, 4, "task-001", 6, "task-002"):
            saved.clear()
            assert saved.wait(30)
            forget(pool, target)
            assert pool.verify().ok
    finally:
        stop.set()
        worker.join(30)
    assert not wrong
    assert not traces(pool, own)
    assert AdapterIndex.open(None, pool).records == ("task-000",)
