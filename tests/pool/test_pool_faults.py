"""A pool whose writer is killed at each step that changes the disk: it verifies, and holds the old state or the new."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cl_adapters.adapters.bottleneck import Bottleneck
from cl_adapters.backbones.frozen import FrozenBackbone
from cl_adapters.errors import PoolError, UnknownName
from cl_adapters.pool import AdapterPool, NewAdapter, PoolClass, Record, manifest
from cl_adapters.pool.disk import locked
from cl_adapters.pool.model_card import CARD
from cl_adapters.sites.sites import Site, Tap
from tests.hostile.killing import deaths, forked, outcome

SMALL = Bottleneck(bottleneck=1)
CLASSES = [PoolClass(label=0), PoolClass(label=1)]

State = tuple[Record, ...]


def make_backbone() -> FrozenBackbone:
    site = Site("blocks.0.ffn", 0, "ffn_parallel", 4, Tap("0", "in"), Tap("0", "out"))
    encoder = nn.Sequential(nn.Linear(4, 4))
    for parameter in encoder.parameters():
        nn.init.ones_(parameter)
    return FrozenBackbone.wrap(encoder, name="tiny", num_features=4, sites=[site])


BACKBONE = make_backbone()


def make_tensors(value: float) -> dict[str, Tensor]:
    shapes = SMALL.shapes(BACKBONE.sites()[0])
    return {f"blocks.0.ffn/{name}": torch.full(shape, float(value)) for name, shape in shapes.items()}


def make_knowledge(value: float) -> dict[str, Tensor]:
    return {"prototypes": torch.full((2, 4), float(value))}


def add(pool: AdapterPool, value: float, **options: Any) -> Record:
    return pool.add(make_tensors(value), SMALL, CLASSES, knowledge=make_knowledge(value), **options)


def files_of(pool: AdapterPool) -> list[str]:
    return [file for record in pool.records for file in record.files]


def state_of(path: Path) -> State:
    """The records without the time at which they were made; checks that every file is there and whole."""
    pool = AdapterPool.open(path, backbone=BACKBONE)
    found = pool.verify()
    assert found.ok, found.problems
    return tuple(dataclasses.replace(record, created="") for record in pool.records)


def do(act: Callable[[AdapterPool], object]) -> Callable[[Path], object]:
    return lambda path: act(AdapterPool.open(path, backbone=BACKBONE))


def with_first(pool: AdapterPool) -> Record:
    return dataclasses.replace(pool.get("first"), benchmark="other")


def three(pool: AdapterPool) -> tuple[Record, ...]:
    """Three adapters: the files of one are there in part, and two share theirs."""
    values = ((1, 5), (3, 1), (3, 6))
    return pool.add_all(
        NewAdapter(tensors=make_tensors(a), adapter=SMALL, classes=CLASSES, knowledge=make_knowledge(b))
        for a, b in values
    )


# Importing writes as adding does, tagging as renaming.
OPERATIONS: dict[str, Callable[[Path], object]] = {
    "create": lambda path: AdapterPool.create(path, BACKBONE),
    "merge": do(lambda pool: add(pool, 1.5, id="mean", parents=["first", "second"], merge={"method": "mean"})),
    "add_all": do(three),
    "copy": do(lambda pool: AdapterPool.open(pool.path.with_name("source")).copy_to(pool)),
    "replace": do(lambda pool: pool.replace(with_first(pool), make_tensors(4), make_knowledge(4))),
    "rename": do(lambda pool: pool.rename("first", "renamed")),
    "remove": do(lambda pool: pool.remove("first")),
    "migrate": do(lambda pool: pool.migrate()),
}


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pool of two adapters."""
    pool = AdapterPool.create(tmp_path_factory.mktemp("template") / "pool", BACKBONE)
    add(pool, 1, id="first")
    add(pool, 2, id="second", tags=["kept"], parents=["first"])
    return pool.path


def prepare(template: Path, pool: Path, operation: str = "") -> Path:
    """A fresh copy of the pool, or none where the operation makes it."""
    shutil.rmtree(pool, ignore_errors=True)
    if operation == "copy":
        shutil.copytree(template, pool.with_name("source"), dirs_exist_ok=True)
        (pool.with_name("source") / CARD).write_text('{"schema_version": 1}')
        AdapterPool.create(pool, BACKBONE)
    elif operation != "create":
        shutil.copytree(template, pool)
    if operation == "migrate":
        to_schema_0(pool)
    return pool


def to_schema_0(pool: Path) -> None:
    """Make the manifest one of schema 0, which had no tags, parents, merge and compression."""
    plain = manifest.manifest_to_plain(manifest.parse_manifest((pool / "manifest.json").read_bytes(), pool))
    for record in plain["records"]:
        for key in ("tags", "parents", "merge", "compression"):
            del record[key]
    (pool / "manifest.json").write_text(json.dumps(plain | {"schema_version": 0}))


def state_or_none(path: Path, operation: str) -> State | None:
    """None for a pool whose making was cut off, which is then made again."""
    if operation == "create" and not (path / "manifest.json").exists():
        AdapterPool.create(path, BACKBONE)
        assert state_of(path) == ()
        return None
    return state_of(path)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_killed_at_every_point(template: Path, tmp_path: Path, operation: str) -> None:
    act = OPERATIONS[operation]
    pool = prepare(template, tmp_path / "run", operation)
    old = None if operation == "create" else state_of(pool)
    act(pool)
    new = state_of(pool)
    assert (old != new) == (operation != "migrate")
    seen = set()
    for where in deaths(lambda: prepare(template, pool, operation), lambda: act(pool)):
        state = state_or_none(pool, operation)
        assert state in (old, new), where
        seen.add(state == new)
        assert operation != "copy" or state == old or (pool / CARD).read_text() == '{"schema_version": 1}'
        survivor = AdapterPool.open(pool, timeout=5)  # the lock of the dead writer is gone
        survivor.gc()
        assert {f"{path.parent.name}/{path.name}" for path in pool.glob("*/*")} == set(files_of(survivor))
        assert {path.name for path in pool.glob("*.json*")} | {path.name for path in pool.glob(".*.json.*")} <= {
            "manifest.json",
            CARD,
        }
    assert operation == "migrate" or seen == {False, True}


# The same at random times: a writer that goes round in a circle of changes is killed 40 times.

CIRCLE: list[Callable[[AdapterPool], object]] = [
    lambda pool: add(pool, 7, id="guest", parents=["first", "second"]),
    lambda pool: pool.tag("guest", add=["here"]),
    lambda pool: pool.replace(pool.get("guest"), make_tensors(8), make_knowledge(8)),
    lambda pool: pool.rename("guest", "visitor"),
    lambda pool: pool.remove("visitor"),
]


def circle(path: Path) -> list[State]:
    """The states of one round, the first before any change."""
    states = [state_of(path)]
    for change in CIRCLE:
        change(AdapterPool.open(path, backbone=BACKBONE))
        states.append(state_of(path))
    assert states.pop() == states[0]
    assert len({repr(state) for state in states}) == len(CIRCLE)
    return states


def go_round(path: Path, states: list[State]) -> None:
    """Go on from wherever the last writer was killed, for ever."""
    pool = AdapterPool.open(path, backbone=BACKBONE)
    at = states.index(tuple(dataclasses.replace(record, created="") for record in pool.records))
    while True:
        CIRCLE[at](pool)
        at = (at + 1) % len(CIRCLE)


def test_killed_at_random_times(template: Path, tmp_path: Path) -> None:
    pool = prepare(template, tmp_path / "run")
    states = circle(pool)
    times = random.Random(0)
    reached = set()
    for _ in range(40):
        with forked(lambda: go_round(pool, states)) as child:
            time.sleep(times.uniform(0.002, 0.06))
            os.kill(child, signal.SIGKILL)
            assert outcome(child) == -signal.SIGKILL
        reached.add(states.index(state_of(pool)))
    assert len(reached) > 2
    survivor = AdapterPool.open(pool, timeout=5)
    survivor.gc()
    assert survivor.verify().orphans == ()
    assert state_of(pool) in states


def test_readers_see_the_old_state_or_the_new_one(template: Path, tmp_path: Path) -> None:
    path = prepare(template, tmp_path / "run")
    states = circle(path)
    reader = AdapterPool.open(path, backbone=BACKBONE, limit=0)
    seen, values = set(), set()
    with forked(lambda: go_round(path, states)) as child:
        end = time.monotonic() + 1.5
        while time.monotonic() < end:
            records = tuple(dataclasses.replace(record, created="") for record in reader.records)
            seen.add(states.index(records))
            for id in ("guest", "visitor", "first"):
                try:
                    tensors = {float(value.min()) for value in reader.tensors(id).values()}
                    rows = {float(value.min()) for value in reader.knowledge(id).values()}
                except UnknownName:
                    continue
                assert len(tensors) == len(rows) == 1  # no mixture
                values |= tensors
        assert os.waitpid(child, os.WNOHANG) == (0, 0)  # the writer was never disturbed
    assert len(seen) > 2
    assert values == {1, 7, 8}


def test_two_writers_wait_for_each_other(template: Path, tmp_path: Path) -> None:
    path = prepare(template, tmp_path / "run")

    def write(name: str) -> None:
        pool = AdapterPool.open(path, backbone=BACKBONE)
        for number in range(8):
            add(pool, 10 + number, id=f"{name}-{number}")
            add(pool, 30 + number)

    with forked(lambda: write("a")) as one, forked(lambda: write("b")) as other:
        assert outcome(one) == outcome(other) == 0
    ids = [record.id for record in state_of(path)]
    expected = ["first", "second", *(f"{name}-{number}" for name in "ab" for number in range(8))]
    assert sorted(ids) == sorted([*expected, *(f"task-{number:03d}" for number in range(16))])


def test_a_writer_that_waits_too_long_says_so(template: Path, tmp_path: Path) -> None:
    path = prepare(template, tmp_path / "run")
    ready, held = os.pipe()

    def hold() -> None:
        with locked(path, 1):
            os.write(held, b"x")
            time.sleep(30)

    with forked(hold):
        assert os.read(ready, 1) == b"x"
        hasty = AdapterPool.open(path, backbone=BACKBONE, timeout=0.1)
        with pytest.raises(PoolError, match=r"another process is writing to .*; waited 0.1 s.*longer timeout"):
            add(hasty, 9)
        assert len(hasty.records) == 2  # readers do not wait
        assert hasty.tensors("first")
    assert add(hasty, 9).id == "task-000"
    os.close(ready)
    os.close(held)
