"""Processes that read and write the same places at the same time: each read gives what some writer finished.

Each process goes round for ``SECONDS`` and fails on its own: its traceback is printed, its exit code fails the test.
"""

from __future__ import annotations

import dataclasses
import os
import re
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from torch import nn

from cl_adapters.adapters.bottleneck import Bottleneck
from cl_adapters.backbones.frozen import FrozenBackbone
from cl_adapters.errors import ClAdaptersError, StorageError, UnknownName
from cl_adapters.index.index import AdapterIndex
from cl_adapters.model.facade import AdapterModel
from cl_adapters.pool import AdapterPool, PoolClass
from cl_adapters.pool.forget import forget
from tests.hostile.killing import forked, outcome
from tests.models import random_model

SECONDS = 2.5
WIDTH = 16
BOTTLENECK = Bottleneck(bottleneck=4, scale=1.0)
GUEST = [PoolClass(label=8), PoolClass(label=9)]
QUERIES = torch.eye(WIDTH)

Turn = Callable[[], object]


@pytest.fixture(scope="module")
def backbone(tiny_vit: Callable[..., nn.Module]) -> FrozenBackbone:
    return FrozenBackbone.wrap(tiny_vit(width=WIDTH, heads=2, img_size=16, depth=1))


@pytest.fixture
def pool(backbone: FrozenBackbone, tmp_path: Path) -> AdapterPool:
    """Two adapters, "task-000" and "task-001", with an index."""
    made = random_model(backbone, [[0, 1], [2, 3]]).save_pool(tmp_path / "pool")
    AdapterIndex.build(made, backend="exact").save()
    return made


def side_by_side(*turns: Turn) -> list[int]:
    """Take each turn again and again in a process of its own, for ``SECONDS``; how often each was taken."""

    def going_round(turn: Turn, told: int) -> None:
        taken, end = 0, time.monotonic() + SECONDS
        while time.monotonic() < end:
            turn()
            taken += 1
        os.write(told, str(taken).encode())

    counts = []
    with ExitStack() as stack:
        children = []
        for turn in turns:
            read, write = os.pipe()
            child = stack.enter_context(forked(lambda turn=turn, write=write: going_round(turn, write)))  # type: ignore[misc]
            os.close(write)
            children.append((child, read))
        failed = [turns[place].__name__ for place, (child, _) in enumerate(children) if not ended_well(child)]
        assert not failed, f"{failed} failed; see the tracebacks above"
        for _, read in children:
            counts.append(int(os.read(read, 20)))
            os.close(read)
    return counts


def ended_well(child: int) -> bool:
    try:
        return outcome(child) == 0
    except AssertionError:
        return False


def add_guest(pool: AdapterPool, value: float) -> None:
    """An adapter whose tensors and keys all begin with one value."""
    tensors = {name: torch.full_like(tensor, value) for name, tensor in pool.tensors("task-000").items()}
    pool.add(tensors, BOTTLENECK, GUEST, id="guest", knowledge=rows_of(value))


def rows_of(value: float) -> dict[str, torch.Tensor]:
    return {"keys": torch.arange(float(WIDTH)).repeat(4, 1) + value, "key_class": torch.tensor([0, 0, 1, 1])}


def replace_guest(pool: AdapterPool, value: float) -> None:
    tensors = {name: torch.full_like(tensor, value) for name, tensor in pool.tensors("guest").items()}
    pool.replace(pool.get("guest"), tensors, rows_of(value))


CHANGES: list[Callable[[AdapterPool], object]] = [
    lambda pool: add_guest(pool, 1),
    lambda pool: replace_guest(pool, 2),
    lambda pool: pool.remove("guest"),
]


def known_by(pool: AdapterPool) -> object:
    return tuple(dataclasses.replace(record, created="") for record in pool.records)


def found_by(index: AdapterIndex) -> object:
    hits = index.query(QUERIES, 20)
    return index.records, [[(hit.record, hit.label, hit.score) for hit in row] for row in hits]


def test_a_pool_and_its_index(pool: AdapterPool) -> None:
    """One process changes records and saves the index after each; others open, verify, load and search."""
    states, answers = [], []
    for change in CHANGES:
        change(pool)
        index = AdapterIndex.build(pool, backend="exact")
        index.save()
        states.append(known_by(pool))
        answers.append(found_by(index))
    assert len({repr(answer) for answer in answers}) == len(CHANGES)
    at = 0

    def opened() -> AdapterPool:
        return AdapterPool.open(pool.path, backbone=pool.backbone, limit=0)

    def write() -> None:
        nonlocal at
        CHANGES[at](pool)
        AdapterIndex.build(pool, backend="exact").save()
        at = (at + 1) % len(CHANGES)

    def read_the_pool() -> None:
        reader = opened()
        assert known_by(reader) in states
        damaged = [problem for problem in reader.verify().problems if not problem.startswith("index ")]
        assert not damaged, "that an index does not fit yet is no damage"
        for id in ("task-000", "task-001", "guest"):
            try:
                tensors, rows = reader.tensors(id), reader.knowledge(id)
            except UnknownName:
                assert id == "guest"
                continue
            if id == "guest":
                assert {float(value.min()) for value in tensors.values()} in ({1.0}, {2.0})
                assert {float(row[0]) for row in rows["keys"]} in ({1.0}, {2.0})

    def read_the_index() -> None:
        assert found_by(AdapterIndex.open(None, opened(), stale="ignore")) in answers
        assert found_by(AdapterIndex.open(None, opened(), stale="ignore", mmap=False, verify=True)) in answers
        try:
            fitting = AdapterIndex.open(None, opened())
        except StorageError as error:
            if "does not fit its pool any more" not in str(error):
                raise
        else:
            assert found_by(fitting) in answers

    written, *read = side_by_side(write, read_the_pool, read_the_index)
    assert written > 0
    assert min(read) > 0


def test_a_model_that_is_saved_again_and_again(backbone: FrozenBackbone, tmp_path: Path) -> None:
    x = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    models = [random_model(backbone, [[0, 1], [2, 3]][: seed + 1], seed=seed) for seed in (0, 1)]
    answers = [model.predict(x).tolist() for model in models]
    place = models[0].save(tmp_path / "model")
    at = 0

    def write() -> None:
        nonlocal at
        at = 1 - at
        models[at].save(place, overwrite=True)

    def load() -> None:
        model = AdapterModel.load(place, backbone)
        assert model.predict(x).tolist() == answers[len(model.classes) // 2 - 1]

    written, *read = side_by_side(write, load, load)
    assert written > 0
    assert min(read) > 0
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_two_who_save_a_model_at_one_place(backbone: FrozenBackbone, tmp_path: Path) -> None:
    model = random_model(backbone, [[0, 1]])
    place = model.save(tmp_path / "model")

    def write() -> None:
        model.save(place, overwrite=True)

    assert min(side_by_side(write, write)) > 0
    assert AdapterModel.load(place, backbone).classes == [0, 1]
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_forgetting_while_the_index_is_rebuilt(pool: AdapterPool) -> None:
    """One process adds and forgets, another makes the index anew; a third searches."""
    AdapterIndex.build(pool, backend="exact").save()

    def forget_it() -> None:
        add_guest(pool, 1)
        assert forget(pool, "guest").removed
        assert pool.ids == ("task-000", "task-001")

    def rebuild() -> None:
        """Where it was forgotten before its keys were read, or before they were saved, there is nothing to do."""
        try:
            AdapterIndex.build(AdapterPool.open(pool.path, backbone=pool.backbone), backend="exact").save()
        except ClAdaptersError as error:
            if not re.search("unknown adapter 'guest'|since this index was made, the pool has lost", str(error)):
                raise

    def search() -> None:
        index = AdapterIndex.open(None, AdapterPool.open(pool.path, backbone=pool.backbone), stale="ignore")
        assert set(index.records) - {"guest"} == {"task-000", "task-001"}
        assert all(len(row) == 3 for row in index.query(QUERIES, 3))

    assert min(side_by_side(forget_it, rebuild, search)) > 0
    assert pool.verify().ok
    AdapterIndex.build(pool, backend="exact").save()
    assert AdapterIndex.open(None, pool).records == ("task-000", "task-001")
    assert [path.name for path in (pool.path / "index").iterdir()] == ["default"]
