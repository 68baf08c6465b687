"""A pool in memory, with Gaussian classes that are easy to tell apart."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cl_adapters.index.index import AdapterIndex
from cl_adapters.pool.record import PoolClass, Record

WIDTH = 12


class MemoryPool:
    """What an index wants of a pool. ``backbone`` maps images [B, 1, 3, 4] to their twelve numbers."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.records: tuple[Record, ...] = ()
        self._knowledge: dict[str, dict[str, Tensor]] = {}
        self.backbone: Any = torch.nn.Flatten()
        self.backbone.features = self.backbone

    def knowledge(self, id: str) -> dict[str, Tensor]:
        return self._knowledge[id]

    def put(self, id: str, knowledge: dict[str, Tensor], labels: list[int], tags: tuple[str, ...] = ()) -> None:
        """Add or replace a record."""
        sha = hashlib.sha256(b"".join(value.numpy().tobytes() for value in knowledge.values())).hexdigest()
        record = Record(
            id=id,
            adapter=None,
            blocks=(),
            classes=tuple(PoolClass(label=label, name=f"class {label}") for label in labels),
            task=None,
            adapter_sha=None,
            knowledge_sha=sha if knowledge else None,
            num_parameters=0,
            tags=tags,
            created="2026-01-01T00:00:00+00:00",
            library_version="0",
        )
        self.drop(id)
        self.records = (*self.records, record)
        self._knowledge[id] = knowledge

    def drop(self, id: str) -> None:
        self.records = tuple(record for record in self.records if record.id != id)
        self._knowledge.pop(id, None)

    def retag(self, id: str, *tags: str) -> None:
        self.records = tuple(dataclasses.replace(r, tags=tags) if r.id == id else r for r in self.records)


def centre(label: int) -> Tensor:
    generator = torch.Generator().manual_seed(1000 + label)
    return 3 * torch.randn(WIDTH, generator=generator)


def features(label: int, n: int, seed: int = 0) -> Tensor:
    """Samples of a class float32 [n, WIDTH]."""
    generator = torch.Generator().manual_seed(seed * 100 + label)
    return centre(label) + 0.5 * torch.randn(n, WIDTH, generator=generator)


def knowledge_of(labels: list[int], n: int = 20) -> dict[str, Tensor]:
    return {
        "keys": torch.cat([features(label, n) for label in labels]),
        "key_class": torch.arange(len(labels)).repeat_interleave(n),
    }


QUERIES = torch.cat([features(label, 3, seed=7) for label in range(10)])
LABELS = torch.arange(10).repeat_interleave(3)


def labels_found(index: AdapterIndex, **options: Any) -> list[int]:
    return [hits[0].label for hits in index.query(QUERIES, 1, **options)]


@pytest.fixture
def pool(tmp_path: Path) -> MemoryPool:
    """Records task-000 ... task-004 with the classes 0, 1 / 2, 3 / ...; even ones are tagged "even"."""
    made = MemoryPool(tmp_path / "pool")
    for task in range(5):
        labels = [2 * task, 2 * task + 1]
        made.put(f"task-{task:03d}", knowledge_of(labels), labels, ("all", "even") if task % 2 == 0 else ("all",))
    return made
