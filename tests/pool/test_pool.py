"""What a pool keeps, gives back, and shares."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from cl_adapters.adapters.bottleneck import Bottleneck
from cl_adapters.backbones.frozen import FrozenBackbone
from cl_adapters.bank.bank import AdapterBank
from cl_adapters.errors import ClAdaptersError, PoolError, UnknownName
from cl_adapters.pool import AdapterPool, PoolClass, Record, store

Make = Callable[..., dict[str, Tensor]]
TWO = [PoolClass(label=7, name="seven"), PoolClass(label=8)]
SMALL = Bottleneck(bottleneck=2)


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(found[key], value), key


def stored(pool: AdapterPool) -> list[str]:
    return sorted(str(path.relative_to(pool.path)) for path in pool.path.rglob("*.safetensors"))


def test_what_was_added_comes_back_bit_by_bit(pool: AdapterPool, tensors: Make, knowledge: Make) -> None:
    again = AdapterPool.open(pool.path)
    assert again.ids == ("task-000", "task-001")
    assert len(again) == 2
    assert "task-001" in again
    assert "task-002" not in again
    assert again.records == pool.records
    for task, record in enumerate(again.records):
        assert_same(again.tensors(record.id), tensors(task))
        assert_same(again.knowledge(record.id), knowledge(task))
        assert record.adapter is not None
        assert record.adapter["type"] == "bottleneck"
        assert record.adapter["bottleneck"] == 2
        assert record.blocks == (0, 1)
        assert record.labels == (2 * task, 2 * task + 1)
        assert record.classes[0].name == f"class {2 * task}"
        assert record.num_parameters == sum(value.numel() for value in tensors(task).values())
        assert record.metrics == {"accuracy": 90.5 + task}
        assert record.benchmark == "digits"
    assert again.verify() == pool.verify()
    assert again.verify().ok


def test_an_adapter_of_some_blocks_goes_through_pool_and_bank(pool: AdapterPool, tensors: Make) -> None:
    record = pool.add(tensors(5, [1]), SMALL, TWO)
    assert record.blocks == (1,)
    bank = AdapterBank(pool.backbone, SMALL)
    assert_same(bank.export(bank.add_slot(pool.tensors(record.id))), tensors(5, [1]))


def test_half_precision_is_stored_as_float32_without_loss(pool: AdapterPool, tensors: Make) -> None:
    half = {key: value.bfloat16() for key, value in tensors(5).items()}
    pool.add(half, SMALL, TWO, id="half")
    assert_same(pool.tensors("half"), {key: value.float() for key, value in half.items()})


def test_the_bare_backbone_is_a_record_without_tensors(pool: AdapterPool, knowledge: Make) -> None:
    record = pool.add({}, None, TWO, knowledge=knowledge(3))
    assert (record.adapter, record.adapter_sha, record.blocks, record.num_parameters) == (None, None, (), 0)
    assert pool.tensors(record.id) == {}
    assert_same(pool.knowledge(record.id), knowledge(3))
    assert pool.verify().ok


def test_ids_are_given_by_number_and_the_first_free_one_is_taken(pool: AdapterPool, tensors: Make) -> None:
    assert pool.add(tensors(2), SMALL, TWO).id == "task-002"
    pool.remove("task-001")
    assert pool.add(tensors(3), SMALL, TWO).id == "task-001"
    with pytest.raises(PoolError, match="'task-000' already: choose another id"):
        pool.add(tensors(3), SMALL, TWO, id="task-000")


def test_the_same_adapter_twice_is_stored_once(pool: AdapterPool, tensors: Make, knowledge: Make) -> None:
    before = stored(pool)
    pool.add(tensors(0), SMALL, TWO, id="twin", knowledge=knowledge(0))
    assert stored(pool) == before
    pool.remove("task-000")
    assert stored(pool) == before
    assert_same(pool.tensors("twin"), tensors(0))
    pool.remove("twin")
    assert len(stored(pool)) == len(before) - 2


def test_adding_again_mends_a_damaged_file(pool: AdapterPool, tensors: Make) -> None:
    file = pool.path / pool.get("task-000").files[0]
    file.write_bytes(file.read_bytes()[:-1])
    assert not pool.verify().ok
    pool.add(tensors(0), SMALL, TWO)
    assert pool.verify().ok


def test_removing_deletes_the_files_and_nothing_else(pool: AdapterPool, tensors: Make) -> None:
    gone, kept = pool.get("task-000"), pool.get("task-001")
    before = {file: (pool.path / file).read_bytes() for file in kept.files}
    pool.remove("task-000")
    assert pool.ids == ("task-001",)
    assert not any((pool.path / file).exists() for file in gone.files)
    assert {file: (pool.path / file).read_bytes() for file in kept.files} == before
    with pytest.raises(UnknownName, match=r"unknown adapter 'task-000'; did you mean 'task-001'\?"):
        pool.tensors("task-000")
    with pytest.raises(UnknownName):
        pool.remove("task-000")


def test_replacing_is_one_change(pool: AdapterPool, tensors: Make, knowledge: Make) -> None:
    old = pool.get("task-000")
    new = pool.replace(
        dataclasses.replace(old, classes=old.classes[:1]), tensors=tensors(9, [0]), knowledge=knowledge(9, 1)
    )
    assert pool.get("task-000") == new
    assert new.blocks == (0,)
    assert new.num_parameters < old.num_parameters
    assert_same(pool.tensors("task-000"), tensors(9, [0]))
    assert_same(pool.knowledge("task-000"), knowledge(9, 1))
    assert not any((pool.path / file).exists() for file in old.files)
    assert pool.ids == ("task-000", "task-001")
    assert pool.verify().ok
    assert pool.verify().orphans == ()


def test_replace_refuses_what_does_not_fit_together(pool: AdapterPool, tensors: Make) -> None:
    old = pool.get("task-000")
    manifest = (pool.path / "manifest.json").read_bytes()
    with pytest.raises(PoolError, match="would have 1 classes, but its knowledge has rows for 2"):
        pool.replace(dataclasses.replace(old, classes=old.classes[:1]))
    with pytest.raises(PoolError, match="num_parameters of adapter 'task-000' follows from its tensors"):
        pool.replace(dataclasses.replace(old, num_parameters=1))
    with pytest.raises(PoolError, match="compression of adapter 'task-000' follows"):
        pool.replace(dataclasses.replace(old, compression="fp16"))
    with pytest.raises(UnknownName, match="task-009"):
        pool.replace(dataclasses.replace(old, id="task-009"), tensors=tensors(1))
    assert (pool.path / "manifest.json").read_bytes() == manifest
    assert pool.verify().orphans == ()
    without = pool.replace(dataclasses.replace(old, knowledge_sha=None, classes=old.classes[:1]))
    assert pool.knowledge(without.id) == {}


def test_replace_sees_that_another_writer_was_first(pool: AdapterPool, tensors: Make) -> None:
    mine = pool.get("task-000")
    other = AdapterPool.open(pool.path, backbone=pool.backbone)
    other.replace(other.get("task-000"), tensors=tensors(9))
    with pytest.raises(PoolError, match="tensors of adapter 'task-000' have changed since"):
        pool.replace(dataclasses.replace(mine, benchmark="other"))
    assert_same(pool.tensors("task-000"), tensors(9))


def test_renaming_follows_to_the_children(pool: AdapterPool, tensors: Make) -> None:
    pool.add(tensors(4), SMALL, TWO, id="child", parents=["task-000", "task-001"], merge={"method": "mean"})
    before = pool.tensors("task-000")
    renamed = pool.rename("task-000", "digits.0-1")
    assert renamed == pool.get("digits.0-1")
    assert pool.ids == ("digits.0-1", "task-001", "child")
    assert pool.get("child").parents == ("digits.0-1", "task-001")
    assert_same(pool.tensors("digits.0-1"), before)
    with pytest.raises(PoolError, match="already"):
        pool.rename("digits.0-1", "child")
    for bad in ("../up", "", "a/b", "Upper", ".hidden", "x" * 65, "white space", "new\nline"):
        with pytest.raises(PoolError, match="cannot be an adapter's id"):
            pool.rename("child", bad)


def test_tags_and_filters(pool: AdapterPool, tensors: Make) -> None:
    pool.add({}, None, [PoolClass(label=3)], id="bare")
    assert pool.tag("task-001", add=["old", "even"], remove=["absent"]).tags == ("old", "even")
    assert [record.id for record in pool.list(tags=["even"])] == ["task-000", "task-001"]
    assert [record.id for record in pool.list(tags=["even", "old"])] == ["task-001"]
    assert [record.id for record in pool.list(classes=[0, 3])] == ["task-000", "task-001", "bare"]
    assert [record.id for record in pool.list(type="bottleneck", classes=[3])] == ["task-001"]
    assert [record.id for record in pool.list()] == list(pool.ids)
    assert pool.tag("task-001", remove=["even", "old"]).tags == ()
    with pytest.raises(PoolError, match="cannot be a tag"):
        pool.tag("task-001", add=["a,b"])


def test_only_so_many_adapters_stay_in_memory(
    pool: AdapterPool, tensors: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    load = store.load_adapter

    def watched(path: Path, record: Record, backbone: FrozenBackbone | None) -> dict[str, Tensor]:
        read.append(record.id)
        return load(path, record, backbone)

    monkeypatch.setattr("cl_adapters.pool.pool.load_adapter", watched)
    few = AdapterPool.open(pool.path, limit=1)
    for id in ("task-000", "task-000", "task-001", "task-001", "task-000"):
        few.tensors(id)
    assert read == ["task-000", "task-001", "task-000"]
    few.tensors("task-000").clear()  # the caller's own dict
    assert few.tensors("task-000")
    pool.add(tensors(2), SMALL, TWO)
    read.clear()
    two = AdapterPool.open(pool.path, limit=2)
    for id in ("task-000", "task-001", "task-000", "task-002", "task-000", "task-001"):
        two.tensors(id)
    assert read == ["task-000", "task-001", "task-002", "task-001"]  # the least recently used went
    read.clear()
    none = AdapterPool.open(pool.path, limit=0)
    none.tensors("task-000")
    none.tensors("task-000")
    assert len(read) == 2


def test_another_process_changes_are_seen(pool: AdapterPool, tensors: Make) -> None:
    reader = AdapterPool.open(pool.path)
    reader.tensors("task-000")
    pool.replace(pool.get("task-000"), tensors=tensors(9))
    assert_same(reader.tensors("task-000"), tensors(9))
    pool.add(tensors(2), SMALL, TWO)
    assert reader.ids[-1] == "task-002"


@pytest.mark.parametrize("name", ["fp16", "int8"])
def test_compressed_adapters_come_back_as_float32(pool: AdapterPool, tensors: Make, name: str, tmp_path: Path) -> None:
    plain = tensors(5)
    record = pool.add(plain, SMALL, TWO, id="small", compression=name)
    assert record.compression == name
    assert record.num_parameters == sum(value.numel() for value in plain.values())
    found = pool.tensors("small")
    assert {key: (value.shape, value.dtype) for key, value in found.items()} == {
        key: (value.shape, torch.float32) for key, value in plain.items()
    }
    for key, value in plain.items():
        assert torch.allclose(found[key], value, atol=0.05), key
        assert not torch.equal(found[key], value), key
    again = pool.replace(dataclasses.replace(pool.get("task-000"), compression=name), tensors=plain)
    assert again.adapter_sha == record.adapter_sha
    pool.export_to(tmp_path / "one", "small")
    assert pool.import_from(tmp_path / "one", id="imported").adapter_sha == record.adapter_sha
    assert pool.verify().ok


def test_gc_deletes_orphans_only(pool: AdapterPool) -> None:
    before = stored(pool)
    (pool.path / "adapters" / ("0" * 64 + ".safetensors")).write_bytes(b"half")
    (pool.path / "knowledge" / ".tmp.12345678").write_bytes(b"")
    (pool.path / ".manifest.json.12345678").write_text("{")
    (pool.path / "index").mkdir()
    (pool.path / "index" / "vectors.npy").write_bytes(b"derived")
    (pool.path / "README.txt").write_text("mine")
    expected = (".manifest.json.12345678", "adapters/" + "0" * 64 + ".safetensors", "knowledge/.tmp.12345678")
    found = pool.verify()
    assert found.ok
    assert found.orphans == expected
    assert pool.gc() == expected
    assert pool.gc() == ()
    assert stored(pool) == before
    assert (pool.path / "index" / "vectors.npy").is_file()
    assert (pool.path / "README.txt").is_file()


def test_reading_needs_no_right_to_write(pool: AdapterPool) -> None:
    (pool.path / ".lock").unlink(missing_ok=True)
    names = sorted(os.listdir(pool.path))
    reader = AdapterPool.open(pool.path)
    reader.tensors("task-000")
    assert reader.verify().ok
    assert sorted(os.listdir(pool.path)) == names


def test_every_error_is_of_the_family(pool: AdapterPool) -> None:
    with pytest.raises(ClAdaptersError):
        AdapterPool.open(pool.path, limit=-1)
    assert repr(pool).endswith("2 adapters of 'seed-0')")


def test_a_file_replaced_between_record_and_reading(
    pool: AdapterPool, tensors: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    late = AdapterPool.open(pool.path)
    load, times = store.load_adapter, []

    def slow(path: Path, record: Record, backbone: FrozenBackbone | None) -> dict[str, Tensor]:
        times.append(record)
        if len(times) == 1:
            pool.replace(pool.get("task-000"), tensors=tensors(9))
        if len(times) == 3:
            pool.remove("task-001")
        return load(path, record, backbone)

    monkeypatch.setattr("cl_adapters.pool.pool.load_adapter", slow)
    assert_same(late.tensors("task-000"), tensors(9))
    assert len(times) == 2
    with pytest.raises(UnknownName, match="task-001"):
        late.tensors("task-001")
