"""Damaged folders: the same answer, or one clear error; never another answer in silence, a foreign error, a hang.

A few hundred mutants by default (about 20 s on one core), always the same ones; thousands of new ones with
``make test-slow``, whose seed is printed with a failure and can be given again: ``HOSTILE_SEED=17 make test-slow``.
``campaign.py`` beside this file counts the outcomes of as many as wanted.
"""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings

from cl_adapters.errors import DataError
from tests.hostile.mutations import CHANGES, STRAY, Mutation, Plan, plans, seal
from tests.hostile.readers import BAD, CLEAN, KINDS, SAME, Found, Kind, Place, judge

FEW = {
    "model": 40,
    "strategy": 40,
    "pool": 30,
    "index": 60,
    "run": 16,
    "results": 30,
    "instruct run": 20,
    "instruct results": 30,
    "commands on a pool": 16,
    "commands on a run": 10,
}
MANY = 20
"""Times as many in the slow suite."""

SEED = int(os.environ.get("HOSTILE_SEED") or random.SystemRandom().randrange(2**32))
"""Of the slow suite."""

QUIET = list(HealthCheck)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """The folders before any damage; no hub is asked for what a damaged folder names."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        yield Place(tmp_path_factory.mktemp("hostile"))


def check(kind: Kind, plan: Plan) -> None:
    """Fail on the two outcomes that may not be."""
    verdict = judge(kind, plan)
    assert not verdict.bad, f"{verdict.outcome}: {verdict.why}\nafter: {'; '.join(verdict.done)}\n{verdict.where}"


@pytest.mark.parametrize("name", FEW)
def test_a_few_hundred_mutants(name: str, place: Place) -> None:
    kind = place.kind(name)

    @settings(
        max_examples=FEW[name],
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=QUIET,
        report_multiple_bugs=False,
    )
    @given(plans(kind.folders[0]))
    def drawn(plan: Plan) -> None:
        check(kind, plan)

    drawn()


@pytest.mark.slow
@pytest.mark.parametrize("name", FEW)
def test_thousands_of_mutants(name: str, place: Place) -> None:
    print(f"HOSTILE_SEED={SEED}")  # shown with a failure
    kind = place.kind(name)

    @seed(SEED)
    @settings(
        max_examples=MANY * FEW[name],
        database=None,
        deadline=None,
        suppress_health_check=QUIET,
        phases=[Phase.generate, Phase.shrink],
    )
    @given(plans(kind.folders[0]))
    def drawn(plan: Plan) -> None:
        check(kind, plan)

    drawn()


def test_every_kind_is_attacked() -> None:
    assert FEW.keys() == KINDS.keys()


@pytest.mark.parametrize("name", KINDS)
def test_untouched_folders_give_the_same_answer(name: str, place: Place) -> None:
    """Also where all digests are computed anew: nothing but them is checked that way."""
    kind = place.kind(name)
    for folder in range(len(kind.folders)):
        for reader in range(len(kind.readers)):
            verdict = judge(kind, Plan(folder, (), True, reader))
            assert verdict.outcome == SAME, verdict


BAD_READERS = {
    "while True: pass": "Hang",
    "bytearray(1 << 40)": "MemoryError",
    "[][0]": "IndexError",
    "found.bits['x'] = 'other'": BAD,
    "found.flaws.append('nan')": BAD,
    "(folder.parent / 'boom').mkdir()": "code from a pickle was run",
    "raise DataError('no')": CLEAN,
    "found.take('x', lambda: 1)": BAD,
}
"""What a reader does on finding a stray file, and what the judge says."""


@pytest.mark.parametrize("act", BAD_READERS)
def test_what_the_outcomes_mean(act: str, place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.hostile.readers.SECONDS", 0.2)

    def read(folder: Path, found: Found) -> None:
        found.bits["x"] = "as it was"
        if (folder / "x.json").exists():
            exec(act, {"folder": folder, "found": found, "DataError": DataError})

    kind = Kind("made up", place.kind("model").folders, (read,))
    stray = Plan(0, (Mutation("stray_file", 0, 0, STRAY.index("x.json")),), False, 0)
    verdict = judge(kind, stray)
    assert BAD_READERS[act] in (verdict.outcome, verdict.why.partition(":")[0]), verdict
    assert judge(kind, Plan(0, (), False, 0)).outcome == SAME


def test_every_change_changes_something(place: Place, tmp_path: Path) -> None:
    """On some folder: a change that never has an object would not be missed otherwise."""
    kinds = [place.kind(name) for name in ("model", "pool", "index")]
    for name, act in CHANGES.items():
        said = []
        for number, kind in enumerate(kinds):
            copy = Path(shutil.copytree(kind.folders[0], tmp_path / f"{name}-{number}"))
            said.append(act(copy, Mutation(name, 1, 3, 1), kind.folders[1]))
            seal(copy)
        assert any(said), name
