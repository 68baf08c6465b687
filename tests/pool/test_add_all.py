"""Many adapters in one change: one manifest, all or nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cl_adapters.backbones.frozen import FrozenBackbone
from cl_adapters.errors import PoolError
from cl_adapters.model.facade import AdapterModel
from cl_adapters.pool import AdapterPool, NewAdapter, PoolClass
from cl_adapters.pool.manifest import write_manifest
from tests.pool.conftest import BOTTLENECK, classes_of, make_knowledge, make_tensors


def new(task: int, /, **options: Any) -> NewAdapter:
    given: dict[str, Any] = {
        "tensors": make_tensors(task),
        "adapter": BOTTLENECK,
        "classes": classes_of(task),
        "knowledge": make_knowledge(task),
    }
    return NewAdapter(**given | options)


def contents(pool: AdapterPool) -> dict[str, bytes]:
    return {str(path.relative_to(pool.path)): path.read_bytes() for path in pool.path.rglob("*") if path.is_file()}


@pytest.fixture
def writes(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The pools whose manifest is written, in order."""
    written: list[Path] = []

    def write(pool: Path, manifest: Any) -> bytes:
        written.append(pool)
        return write_manifest(pool, manifest)

    monkeypatch.setattr("cl_adapters.pool.disk.write_manifest", write)
    return written


def test_as_one_by_one(pool: AdapterPool, backbone: FrozenBackbone, tmp_path: Path, writes: list[Path]) -> None:
    other = AdapterPool.create(tmp_path / "other", backbone)
    made = other.add_all([
        new(0, tags=["even"], task=0, benchmark="digits", metrics={"accuracy": 90.5}),
        new(1, task=1, benchmark="digits", metrics={"accuracy": 91.5}),
    ])  # fmt: skip
    assert made == other.records
    assert [vars(r) | {"created": ""} for r in made] == [vars(r) | {"created": ""} for r in pool.records]
    assert other.verify().ok
    assert len(writes) == 1
    more = other.add_all(new(task, id="named" if task == 1 else None, compression="int8") for task in range(3))
    assert [record.id for record in more] == ["task-002", "named", "task-003"]
    assert len(writes) == 2
    assert other.add_all([]) == ()
    assert len(writes) == 2
    again = other.add_all([new(7), new(7)])
    assert again[0].files == again[1].files, "the same adapter twice is one file"
    assert other.verify().ok
    assert not other.verify().orphans


def bad_end(end: Callable[[], NewAdapter]) -> Iterator[NewAdapter]:
    yield new(1, id="first")  # has the files of task-001, which must stay
    yield new(5, id="second")
    yield end()


def unreadable() -> NewAdapter:
    raise RuntimeError("the source broke")


@pytest.mark.parametrize(
    ("end", "message"),
    [
        (lambda: new(6, id="task-000"), "'task-000' already"),
        (lambda: new(6, id="second"), "'second' already"),
        (lambda: new(6, id="../x"), "id"),
        (lambda: new(6, tensors={"a": torch.zeros(1)}), "this adapter"),
        (lambda: new(6, knowledge=make_knowledge(6, classes=3)), "this knowledge"),
        (lambda: new(6, adapter=None), "tensors without an adapter type"),
        (unreadable, "the source broke"),
    ],
)
def test_none_where_one_cannot_be(pool: AdapterPool, end: Callable[[], NewAdapter], message: str) -> None:
    before = contents(pool)
    with pytest.raises((PoolError, RuntimeError), match=message):
        pool.add_all(bad_end(end))
    assert contents(pool) == before
    assert pool.verify().ok


def test_nobody_else_writes_meanwhile(pool: AdapterPool) -> None:
    hasty = AdapterPool.open(pool.path, backbone=pool.backbone, timeout=0.05)

    def entries() -> Iterator[NewAdapter]:
        yield new(5)
        assert hasty.ids == pool.ids == ("task-000", "task-001"), "readers see the old state"
        with pytest.raises(PoolError, match="another process is writing"):
            hasty.remove("task-000")
        yield new(6)

    pool.add_all(entries())
    assert hasty.ids == ("task-000", "task-001", "task-002", "task-003")


def test_a_model_is_written_at_once(backbone: FrozenBackbone, tmp_path: Path, writes: list[Path]) -> None:
    model = AdapterModel(backbone)
    for task in range(5):
        model.add_task([task])
        model.prototypes.append(torch.randn(1, backbone.num_features, generator=torch.Generator().manual_seed(task)))
    pool = model.save_pool(tmp_path / "model")
    assert len(writes) == 1
    assert pool.ids == tuple(f"task-{task:03d}" for task in range(5))
    assert [record.classes for record in pool.records] == [(PoolClass(label=task),) for task in range(5)]
    assert _rows(pool) == [row.tolist() for row in model.prototypes.prototypes]


def _rows(pool: AdapterPool) -> list[list[float]]:
    rows: list[Tensor] = [pool.knowledge(id)["prototypes"][0] for id in pool.ids]
    return [row.tolist() for row in rows]
