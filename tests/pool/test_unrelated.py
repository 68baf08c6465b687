"""Adapters from elsewhere: everything in a folder is checked, and equal ids of two pools make no lineage."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from cl_adapters.adapters.bottleneck import Bottleneck
from cl_adapters.backbones.frozen import FrozenBackbone
from cl_adapters.bank.bank import AdapterBank
from cl_adapters.errors import ConfigError, PoolError
from cl_adapters.pool import AdapterPool, PoolClass
from cl_adapters.pool.blobs import to_bytes
from cl_adapters.pool.merging import merge_records, one_lineage

Tensors = Callable[..., dict[str, Tensor]]
SMALL = Bottleneck(bottleneck=2)


@pytest.fixture
def pools(tmp_path: Path, backbone: FrozenBackbone, tensors: Tensors) -> list[AdapterPool]:
    """Two pools of two adapters, the second trained from the first; the same ids, but other tensors."""
    made = [AdapterPool.create(tmp_path / name, backbone) for name in ("here", "there")]
    for seed, pool in enumerate(made):
        pool.add(tensors(10 + seed), SMALL, [PoolClass(label=20 * seed)])
        pool.add(tensors(20 + seed), SMALL, [PoolClass(label=20 * seed + 1)], parents=["task-000"])
    return made


def test_an_imported_adapter_is_of_another_lineage(pools: list[AdapterPool], tmp_path: Path) -> None:
    here, there = pools
    came = here.import_from(there.export_to(tmp_path / "folder", "task-001"), id="came")
    assert came.parents == (f"task-000.{there.get('task-000').adapter_sha[:12]}",)  # type: ignore[index]
    assert not one_lineage(here, [here.get("task-001"), came])
    with pytest.raises(ConfigError, match="are no linear maps"):
        merge_records(here, ["task-001", "came"])


def test_a_copied_adapter_too(pools: list[AdapterPool]) -> None:
    here, there = pools
    there.rename("task-001", "came")
    (came,) = there.copy_to(here, ["came"])
    assert came.parents == (f"task-000.{there.get('task-000').adapter_sha[:12]}",)  # type: ignore[index]
    assert here.get("came") == came
    assert there.copy_to(here, ["came"]) == (), "it is there already"


def test_what_comes_back_keeps_its_lineage(pools: list[AdapterPool], tmp_path: Path) -> None:
    here, there = pools
    folder = here.export_to(tmp_path / "folder", "task-001")
    before = here.get("task-001")
    here.remove("task-001")
    assert here.import_from(folder) == before
    third = AdapterPool.create(tmp_path / "third", here.backbone)
    here.copy_to(third)
    assert third.records == here.records
    # two of one pool, without what they come from: still of one lineage, also when exported again
    for id in ("a", "b"):
        there.import_from(folder, id=id)
    assert one_lineage(there, [there.get("a"), there.get("b")])
    again = third.import_from(there.export_to(tmp_path / "again", "a"), id="a")
    assert again.parents == there.get("a").parents


def test_a_new_adapter_is_not_taken_for_a_parent_that_is_gone(pools: list[AdapterPool], tensors: Tensors) -> None:
    here, _ = pools
    here.remove("task-000")
    assert here.add(tensors(5), SMALL, []).id == "task-002"


def forge(folder: Path, name: str, content: bytes, **record: object) -> None:
    """Other bytes in a folder, with their own SHA-256 in its record."""
    key = {"adapter.safetensors": "adapter_sha", "knowledge.safetensors": "knowledge_sha"}[name]
    plain = json.loads((folder / "record.json").read_text())
    plain["records"][0] |= {key: hashlib.sha256(content).hexdigest(), **record}
    (folder / "record.json").write_text(json.dumps(plain))
    (folder / name).write_bytes(content)


def test_folders_with_forged_numbers_or_shapes(pool: AdapterPool, backbone: FrozenBackbone, tmp_path: Path) -> None:
    names = ("numbers", "keys", "shapes")
    folders = {name: pool.export_to(tmp_path / name, "task-000") for name in names}
    tensors, knowledge = pool.tensors("task-000"), pool.knowledge("task-000")
    bad = {key: value * torch.nan for key, value in tensors.items()}
    forge(folders["numbers"], "adapter.safetensors", to_bytes(bad))
    forge(folders["keys"], "knowledge.safetensors", to_bytes(knowledge | {"keys": knowledge["keys"] / 0}))
    forge(folders["shapes"], "adapter.safetensors", to_bytes({"blocks.9/x": torch.ones(3)}), num_parameters=3)
    reader = AdapterPool.open(pool.path, backbone=backbone)
    for name, message in zip(names, ("has NaN or", "'keys' has NaN or", "has not the tensors of"), strict=True):
        with pytest.raises(PoolError, match=message):
            reader.import_from(folders[name], id="bad")
    forge(folders["shapes"], "adapter.safetensors", to_bytes(tensors), num_parameters=84, blocks=[1])
    with pytest.raises(PoolError, match=r"has tensors for blocks \(0, 1\), but its record says \(1,\)"):
        reader.import_from(folders["shapes"], id="bad")
    assert pool.ids == ("task-000", "task-001")
    assert pool.gc() == ()


def test_a_backbone_that_can_be_loaded_is_loaded_for_the_check(tmp_path: Path) -> None:
    backbone = FrozenBackbone.load("vit_glyph_tiny")
    bank = AdapterBank(backbone, SMALL)
    pool = AdapterPool.create(tmp_path / "pool", backbone)
    record = pool.add(bank.fresh(torch.Generator().manual_seed(0)), SMALL, [])
    folder = pool.export_to(tmp_path / "folder", record.id)
    forge(folder, "adapter.safetensors", to_bytes({"blocks.9/x": torch.ones(3)}), num_parameters=3)
    with pytest.raises(PoolError, match="has not the tensors of"):
        AdapterPool.open(pool.path).import_from(folder, id="bad")


def test_verification_sees_numbers_that_are_not_finite(pool: AdapterPool) -> None:
    knowledge = pool.knowledge("task-001")
    content = to_bytes(knowledge | {"keys": knowledge["keys"] / 0})
    sha = hashlib.sha256(content).hexdigest()
    (pool.path / "knowledge" / f"{sha}.safetensors").write_bytes(content)
    manifest = json.loads((pool.path / "manifest.json").read_text())
    manifest["records"][1]["knowledge_sha"] = sha
    (pool.path / "manifest.json").write_text(json.dumps(manifest))
    where = pool.path / "knowledge" / f"{sha}.safetensors"
    assert pool.verify().problems == (f"task-001: {where}: tensor 'keys' has NaN or infinite values",)
    with pytest.raises(PoolError, match=f"{where}: tensor 'keys' has NaN or infinite values"):
        pool.knowledge("task-001")
