"""Centroids of a class stand for more or fewer features: the pool keeps for how many, and nobody counts them alike."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from cl_adapters.backbones.frozen import FrozenBackbone
from cl_adapters.errors import DataError, PoolError
from cl_adapters.index.index import AdapterIndex
from cl_adapters.model.facade import AdapterModel
from cl_adapters.parts.keys import CLASS_KEYS, Keys, KeysConfig, keys_of
from cl_adapters.pool import AdapterPool
from cl_adapters.pool.forget import forget
from cl_adapters.pool.merging import merge_records
from tests.models import random_model

WIDTH = 16
SIZES = [90, 10, 30, 70, 50, 50]


def lopsided(label: int) -> Tensor:
    """Two clusters far apart, float32 [100, 16]."""
    draw, first = torch.Generator().manual_seed(label), SIZES[2 * label]
    centres = 10 * torch.randn(2, WIDTH, generator=draw)
    of = (torch.arange(100) >= first).long()
    return centres[of] + 0.1 * torch.randn(100, WIDTH, generator=draw)


@pytest.fixture
def model(tiny_vit: Callable[..., nn.Module]) -> AdapterModel:
    """Two tasks with the classes 0, 1 and 2; two centroids each."""
    backbone = FrozenBackbone.wrap(tiny_vit(width=WIDTH, heads=2, img_size=16, depth=2))
    made = random_model(backbone, [[0, 1], [2]], merged=True)
    made.parts[CLASS_KEYS] = keys = Keys(KeysConfig(kind="centroids", per_class=2, held_out=0), WIDTH)
    for label in range(3):
        keys.add_class(lopsided(label), torch.Generator().manual_seed(label))
    return made


def means() -> Tensor:
    return torch.stack([lopsided(label).mean(0) for label in range(3)])


def test_kept_by_model_and_pool(model: AdapterModel, tmp_path: Path) -> None:
    assert torch.allclose(model.part(CLASS_KEYS, Keys).means(), means(), atol=1e-4)
    again = AdapterModel.load(model.save(tmp_path / "model"), model.backbone)
    assert torch.equal(again.part(CLASS_KEYS, Keys).means(), model.part(CLASS_KEYS, Keys).means())
    pool = model.save_pool(tmp_path / "pool")
    assert sorted(pool.knowledge("task-000")["key_size"].tolist()) == [10, 30, 70, 90]
    assert pool.verify().ok
    index = AdapterIndex.build(pool, metric="l2", backend="exact")
    for options in ({}, {"index": index}):
        found = AdapterModel.from_pool(pool, **options)  # type: ignore[arg-type]
        assert torch.allclose(keys_of(found).means(), means(), atol=1e-4)
    assert max(-hits[0].score for hits in index.query(means(), 1)) < 1e-6, "prototypes of the index"
    copied = AdapterModel.from_pool(pool).save_pool(tmp_path / "copy")
    assert copied.get("task-000").knowledge_sha == pool.get("task-000").knowledge_sha


def test_no_covariance_is_made_of_them(model: AdapterModel, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="'task-000' keeps centroids of class 0"):
        AdapterIndex.build(model.save_pool(tmp_path / "pool"), metric="mahalanobis")


def test_forgotten_and_merged_with_their_keys(model: AdapterModel, tmp_path: Path) -> None:
    pool = model.save_pool(tmp_path / "pool")
    plain = {key: value for key, value in pool.knowledge("task-001").items() if key != "key_size"}
    forget(pool, 0)
    assert sorted(pool.knowledge("task-000")["key_size"].tolist()) == [30, 70]
    pool.replace(pool.get("task-001"), knowledge=plain)  # as another release wrote it
    merged = merge_records(pool, ["task-000", "task-001"], id="both")
    assert pool.knowledge("both")["key_size"].tolist()[2:] == [1, 1]
    assert not merged.notes
    both = AdapterModel.from_pool(pool, ["both"])
    assert torch.allclose(keys_of(both).means()[0], means()[1], atol=1e-4)
    part = AdapterModel.from_pool(pool, ["task-000", "task-001"])
    assert torch.equal(keys_of(part).means(), keys_of(both).means())


def test_without_them_all_count_alike(model: AdapterModel, tmp_path: Path) -> None:
    """What earlier releases wrote: loaded, gone on with and saved as then."""
    keys = model.part(CLASS_KEYS, Keys)
    keys.size_M = None
    alike = torch.stack([keys.keys_MD[keys.column_M == column].mean(0) for column in range(3)])
    again = AdapterModel.load(model.save(tmp_path / "model"), model.backbone).part(CLASS_KEYS, Keys)
    assert torch.allclose(again.means(), alike, atol=1e-5)
    again.add_class(lopsided(0), torch.Generator().manual_seed(0))
    assert again.size_M is None
    assert "size_M" not in again.tensors()
    pool = model.save_pool(tmp_path / "pool")
    assert "key_size" not in pool.knowledge("task-000")
    assert torch.allclose(keys_of(AdapterModel.from_pool(pool)).means(), alike, atol=1e-5)


def test_sizes_that_cannot_be(model: AdapterModel, tmp_path: Path) -> None:
    pool: AdapterPool = model.save_pool(tmp_path / "pool")
    good = pool.knowledge("task-000")
    for wrong, message in (
        ({**good, "key_size": torch.tensor([1, 0, 1, 1])}, "key_size has 0, but a key is the mean of at least 1"),
        ({**good, "key_size": torch.ones(3, dtype=torch.long)}, r"has to be .* = \[[34]\b"),
        ({"key_size": torch.ones(3, dtype=torch.long)}, "key_size goes with keys"),
    ):
        with pytest.raises(PoolError, match=message):
            pool.replace(pool.get("task-000"), knowledge=wrong)
