"""Pools and their backbones, copies between pools, adapters as folders."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from cl_adapters.adapters.bottleneck import Bottleneck
from cl_adapters.backbones.frozen import FrozenBackbone
from cl_adapters.bank.bank import AdapterBank
from cl_adapters.errors import IncompatibleBackbone, PoolError, StorageError
from cl_adapters.pool import AdapterPool, PoolClass

Make = Callable[..., dict[str, Tensor]]
TWO = [PoolClass(label=7, name="seven"), PoolClass(label=8)]
SMALL = Bottleneck(bottleneck=2)


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(found[key], value), key


def stored(pool: AdapterPool) -> list[str]:
    return sorted(str(path.relative_to(pool.path)) for path in pool.path.rglob("*.safetensors"))


def test_another_backbone_is_refused_with_both_names(pool: AdapterPool, tmp_path: Path) -> None:
    right = pool.backbone.fingerprint[:16]
    other = FrozenBackbone.wrap(torch.nn.Linear(8, 8), name="other", num_features=8)
    with pytest.raises(IncompatibleBackbone) as caught:
        AdapterPool.open(pool.path, backbone=other)
    for part in ("'seed-0'", right, "'other'", other.fingerprint[:16]):
        assert part in str(caught.value)
    foreign = AdapterPool.create(tmp_path / "foreign", other)
    with pytest.raises(IncompatibleBackbone, match=right):
        pool.copy_to(foreign)
    with pytest.raises(IncompatibleBackbone, match=right):
        foreign.import_from(pool.export_to(tmp_path / "one", "task-000"))
    with pytest.raises(IncompatibleBackbone, match=r"wrapped module \(seed-0\).*backbone=FrozenBackbone.wrap"):
        _ = AdapterPool.open(pool.path).backbone


def test_a_pool_is_made_once_and_in_an_empty_place(pool: AdapterPool, backbone: FrozenBackbone, tmp_path: Path) -> None:
    with pytest.raises(PoolError, match="a pool already"):
        AdapterPool.create(pool.path, backbone)
    assert len(pool) == 2
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("mine")
    with pytest.raises(PoolError, match="not empty"):
        AdapterPool.create(tmp_path / "notes", backbone)
    with pytest.raises(PoolError, match="cannot make a pool"):
        AdapterPool.create(tmp_path / "notes" / "a.txt" / "pool", backbone)
    with pytest.raises(PoolError, match="does not exist"):
        AdapterPool.open(tmp_path / "nowhere")
    with pytest.raises(PoolError, match=r"not a pool: it has no manifest.json"):
        AdapterPool.open(tmp_path / "notes")


def test_copying_to_another_pool(pool: AdapterPool, backbone: FrozenBackbone, tensors: Make, tmp_path: Path) -> None:
    other = AdapterPool.create(tmp_path / "other", backbone)
    other.add(tensors(9), SMALL, TWO, id="own")
    assert pool.copy_to(other, ["task-001"]) == (pool.get("task-001"),)
    assert [record.id for record in pool.copy_to(other)] == ["task-000"]
    assert other.ids == ("own", "task-001", "task-000")
    assert stored(other) == sorted({*stored(pool), *other.get("own").files})
    assert other.verify().ok
    other.tag("task-000", add=["changed"])
    with pytest.raises(PoolError, match="'task-000' already"):
        pool.copy_to(other)
    pool.add(tensors(3), SMALL, TWO, id="new")
    with pytest.raises(PoolError, match="'task-000' already"):  # all or nothing
        pool.copy_to(other, ["new", "task-000"])
    assert "new" not in other


def test_an_adapter_as_a_folder(pool: AdapterPool, backbone: FrozenBackbone, tmp_path: Path) -> None:
    folder = pool.export_to(tmp_path / "one", "task-001")
    assert sorted(path.name for path in folder.iterdir()) == [
        "adapter.safetensors",
        "knowledge.safetensors",
        "record.json",
    ]
    other = AdapterPool.create(tmp_path / "other", backbone)
    assert other.import_from(folder) == pool.get("task-001")
    assert_same(other.tensors("task-001"), pool.tensors("task-001"))
    assert_same(other.knowledge("task-001"), pool.knowledge("task-001"))
    assert other.import_from(folder, id="again").id == "again"
    with pytest.raises(PoolError, match="already"):
        other.import_from(folder)
    with pytest.raises(StorageError, match="exists already"):
        pool.export_to(folder, "task-000")
    with pytest.raises(PoolError, match="does not exist"):
        other.import_from(tmp_path / "nowhere")
    assert other.verify().ok


def test_opening_is_light(pool: AdapterPool, repo_root: Path) -> None:
    code = f"""
import sys
from cl_adapters import AdapterPool
pool = AdapterPool.open({str(pool.path)!r})
assert [record.id for record in pool.list(tags=["even"])] == ["task-000"]
pool.tag("task-001", add=["new"])
assert "torch" not in sys.modules
pool.tensors("task-000")
assert "timm" not in sys.modules
assert pool.verify().ok
assert not {{"timm", "avalanche", "transformers", "faiss"}} & set(sys.modules)
"""
    environment = {**os.environ, "PYTHONPATH": str(repo_root)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_backbone_is_loaded_from_its_source(tmp_path: Path) -> None:
    made = FrozenBackbone.load("vit_glyph_tiny")
    bank = AdapterBank(made, SMALL)
    pool = AdapterPool.create(tmp_path / "pool", made)
    record = pool.add(bank.fresh(torch.Generator().manual_seed(0)), SMALL, TWO)
    again = AdapterPool.open(pool.path)
    assert again.backbone.fingerprint == again.backbone_card.fingerprint == made.fingerprint
    assert_same(again.tensors(record.id), pool.tensors(record.id))
    assert again.backbone_card.preprocessing is not None
