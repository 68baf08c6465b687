"""Whoever writes is killed, or finds the disk full, at each step that changes the disk: the old state or the new one.

The pool's own changes are walked in tests/pool/test_pool_faults.py; here models, indexes, forgetting, reports and runs.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from cl_adapters._io import unsealed
from cl_adapters.backbones.frozen import FrozenBackbone
from cl_adapters.benchmarks.results import instruct as instruct_results
from cl_adapters.benchmarks.results import results as run_results
from cl_adapters.benchmarks.run import instruct, runner
from cl_adapters.benchmarks.run.experiment import resolve
from cl_adapters.benchmarks.run.session import complete_tasks
from cl_adapters.index.arrays import write_array
from cl_adapters.index.calibration import calibrate
from cl_adapters.index.index import AdapterIndex
from cl_adapters.model.facade import AdapterModel
from cl_adapters.pool import AdapterPool
from cl_adapters.pool.forget import forget
from tests.hostile.killing import EVERY, SIZES, cut_writes, deaths, files_up_to, full_disks, photographed
from tests.models import random_model

X = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(7))
TASKS = [[0, 1], [2, 3]]
SOME = (3, 20, 50)
"""Steps at which a child is really killed; what the disk is like at every step is seen on copies of it."""


@pytest.fixture(autouse=True)
def unsynced(monkeypatch: pytest.MonkeyPatch) -> None:
    """No power is cut here, and syncing takes most of the time."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


@pytest.fixture(scope="module")
def backbone(tiny_vit: Callable[..., nn.Module]) -> FrozenBackbone:
    return FrozenBackbone.wrap(tiny_vit(width=16, heads=2, img_size=16, depth=1))


def fresh(template: Path, home: Path) -> None:
    """Make ``home`` a copy of ``template``."""
    shutil.rmtree(home, ignore_errors=True)
    shutil.copytree(template, home)


def tree(home: Path) -> set[str]:
    """Names of all that is there, hidden or not."""
    return {str(path.relative_to(home)) for path in home.rglob("*") if path.name != ".lock"}


def assert_stays_whole(
    template: Path, home: Path, act: Callable[[Path], object], state: Callable[[Path], object]
) -> None:
    """Walk ``act`` on copies of ``template``: the old state or the new one, both seen, and nothing between.

    After a death the act can be done again; where the disk was full, it is said once, and nothing is left behind.
    Both take a folder like ``template``.
    """
    fresh(template, home)
    old, before = state(home), tree(home)
    photos = photographed(lambda: act(home), home, home.with_name("photos"))
    new, after = state(home), tree(home)
    assert new != old
    states = [state(photo) for photo in photos]
    changed = states.index(new)
    assert 0 < changed < len(states) - 1, "killed while cleaning up"
    assert states == [old] * changed + [new] * (len(states) - changed)
    for photo in photos[::5] + photos[changed - 1 : changed + 1]:
        act(photo)
        assert state(photo) == new, photo.name
    for walk in (full_disks, cut_writes):
        refusals = []
        for where, refused in walk(lambda: fresh(template, home), lambda: act(home)):
            assert state(home) == (old if refused else new), where
            assert tree(home) == (before if refused else after), where
            refusals.append(refused)
        assert any(refusals)
    for where in deaths(lambda: fresh(template, home), lambda: act(home), SOME):
        assert state(home) in (old, new), where
        act(home)
        assert state(home) == new, where


# --- models ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Models:
    """A folder with an older model, and the newer one: other prototypes, the same adapters."""

    backbone: FrozenBackbone
    folder: Path
    newer: AdapterModel

    def answers(self, place: Path) -> bytes | None:
        """The bits that the model there predicts; None where there is none."""
        if not place.exists():
            return None
        model = AdapterModel.load(place, self.backbone)
        return json.dumps(model.classes).encode() + model.predict(X).numpy().tobytes()


@pytest.fixture(scope="module")
def models(backbone: FrozenBackbone, tmp_path_factory: pytest.TempPathFactory) -> Models:
    model = random_model(backbone, TASKS)
    folder = tmp_path_factory.mktemp("models")
    model.save(folder / "old")
    with torch.no_grad():
        model.prototypes.prototypes += torch.eye(4, 16)
    return Models(backbone, folder, model)


def test_a_model_to_a_new_place(models: Models, tmp_path: Path) -> None:
    """Linked to the older one, as a run saves; that one stays as it is."""
    older = models.answers(models.folder / "old")

    def state(home: Path) -> bytes | None:
        assert models.answers(home / "old") == older
        return models.answers(home / "new")

    def save(home: Path) -> None:
        models.newer.save(home / "new", link_from=home / "old", overwrite=(home / "new").exists())

    assert_stays_whole(models.folder, tmp_path / "home", save, state)


def test_a_model_over_an_older_one(models: Models, tmp_path: Path) -> None:
    assert_stays_whole(
        models.folder,
        tmp_path / "home",
        lambda home: models.newer.save(home / "old", overwrite=True),
        lambda home: models.answers(home / "old"),
    )


def test_a_strategy_over_an_older_one(backbone: FrozenBackbone, tmp_path: Path) -> None:
    """Model, clock and metrics are of one state."""
    from cl_adapters.strategies import MOS

    def load(place: Path) -> MOS:
        return MOS.load(place, backbone, evaluator=None)

    strategy = MOS(random_model(backbone, TASKS), evaluator=None, seed=1)
    (tmp_path / "template").mkdir()
    strategy.save(tmp_path / "template" / "x")
    with torch.no_grad():
        strategy.model.prototypes.prototypes += torch.eye(4, 16)
    strategy.clock.train_iterations = 7
    assert_stays_whole(
        tmp_path / "template",
        tmp_path / "home",
        lambda home: strategy.save(home / "x", overwrite=True),
        lambda home: (load(home / "x").clock.train_iterations, load(home / "x").model.predict(X).numpy().tobytes()),
    )


# --- indexes and forgetting ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pool(backbone: FrozenBackbone, tmp_path_factory: pytest.TempPathFactory) -> AdapterPool:
    """Two adapters and an index."""
    made = random_model(backbone, TASKS, held_out=0.5, keys_per_class=4).save_pool(
        tmp_path_factory.mktemp("pool") / "pool"
    )
    AdapterIndex.build(made, keys="features", backend="exact", metric="ip").save()  # which keeps them as they are
    return made


def found_by(pool: AdapterPool, place: Path) -> object:
    """All that an index of a pool answers; None where there is none."""
    if not place.exists():
        return None
    index = AdapterIndex.open(place, pool, verify=True, stale="ignore")
    hits = index.query(torch.eye(16), 50)
    return index.records, index.threshold, [[(hit.record, hit.label, hit.score) for hit in row] for row in hits]


def test_an_index_over_an_older_one(pool: AdapterPool, tmp_path: Path) -> None:
    newer = AdapterIndex.build(pool, keys="prototypes", backend="exact", metric="mahalanobis")
    calibrate(newer, 0.2)
    assert_stays_whole(
        pool.path / "index",
        tmp_path / "home",
        lambda home: newer.save(home / "default"),
        lambda home: found_by(pool, home / "default"),
    )


@pytest.mark.parametrize("numbers", [20, 300, 3000])
def test_an_array_is_written_whole_or_refused(tmp_path: Path, numbers: int) -> None:
    array = np.arange(numbers).reshape(-1, 2)
    with files_up_to(200), pytest.raises(OSError, match="File too large"):
        write_array(tmp_path / "cut.npy", array)
    write_array(tmp_path / "ours.npy", array)
    np.save(tmp_path / "theirs.npy", array)
    assert (tmp_path / "ours.npy").read_bytes() == (tmp_path / "theirs.npy").read_bytes()


@pytest.mark.parametrize("target", ["task-001", 2], ids=["adapter", "class"])
@pytest.mark.parametrize("every", [9, pytest.param(1, marks=pytest.mark.slow)])
def test_forgetting(pool: AdapterPool, tmp_path: Path, target: str | int, every: int) -> None:
    """Before it is done it can be asked for again, after it ``gc`` deletes what is left: then no byte of it is there.

    An index is derived: it is the one of before, one without the target, or gone where there was no space to make it
    anew, and never broken.
    """
    home = tmp_path / "pool"
    rows = pool.knowledge("task-001")
    own = rows["keys"] if target == "task-001" else rows["keys"][rows["key_class"] == 0]
    needles = [row.numpy().tobytes() for row in own]

    def opened(home: Path) -> AdapterPool:
        return AdapterPool.open(home, backbone=pool.backbone, timeout=5)

    def records(home: Path) -> object:
        reader = opened(home)
        assert reader.verify().ok
        return reader.records

    def index(home: Path) -> object:
        return found_by(opened(home), home / "index" / "default")

    def traces(home: Path) -> list[str]:
        files = [path for path in home.rglob("*") if path.is_file()]
        return [str(path) for path in files if any(needle in path.read_bytes() for needle in needles)]

    def done_in(home: Path) -> bool:
        """Whether a death left it done, and not as it was."""
        done = records(home) == new
        assert done or records(home) == old, home
        assert index(home) in (with_it, between, without), home
        return done

    def finish(home: Path, where: str) -> None:
        if done_in(home):
            opened(home).gc()
        else:
            forget(opened(home), target)
            assert index(home) == without, where
        assert records(home) == new, where
        assert not traces(home), where

    fresh(pool.path, home)
    assert len(traces(home)) == 2, "knowledge and index, else this test sees nothing"
    old, with_it = records(home), index(home)
    forget(opened(home), "task-001")
    between = index(home)
    fresh(pool.path, home)
    photos = photographed(lambda: forget(opened(home), target), home, tmp_path / "photos")
    new, without, after = records(home), index(home), tree(home)
    assert not traces(home)
    done = [done_in(photo) for photo in photos]
    changed = done.index(True)
    assert done == [False] * changed + [True] * (len(done) - changed)
    for photo in photos[::every] + photos[changed - 1 : changed + 1]:
        finish(photo, photo.name)
    for walk, points in ((full_disks, EVERY[::every]), (cut_writes, SIZES)):
        for where, refused in walk(lambda: fresh(pool.path, home), lambda: forget(opened(home), target), points):
            assert records(home) in ((old, new) if refused else (new,)), where
            assert index(home) in (with_it, between, without, None), where
            assert not [name for name in tree(home) if name.startswith((".", "index/."))], where
            assert refused or tree(home) <= after
    for where in deaths(lambda: fresh(pool.path, home), lambda: forget(opened(home), target), SOME):
        finish(home, where)


# --- runs ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """A way to run something into a folder, and to go on.

    Attributes:
        start: run all of it into a new folder.
        resume: go on in it.
        results: name of its results, and
        read: what they say but for the clock, by the run's folder.
        report: name of what is written at its end.
        whole: the folder of an uninterrupted run.
    """

    start: Callable[[Path], object]
    resume: Callable[[Path], object]
    results: str
    read: Callable[[Path], dict[str, Any]]
    report: str | None
    whole: Path

    def state(self, out: Path) -> tuple[int, int, bool]:
        """Complete tasks, tasks in the results, whether there is a report; -1 where there is no run.

        All of it is checked to be that of the uninterrupted run.
        """
        if not out.exists():
            return (-1, 0, False)
        tasks = complete_tasks(out)
        for task in tasks:
            assert saved(task) == saved(self.whole / "tasks" / task.name)
        told = 0
        if (out / self.results).exists():
            found, whole = self.read(out), self.read(self.whole)
            told = len(found["trainable_parameters"])
            assert told in (len(tasks) - 1, len(tasks))
            assert found["trainable_parameters"] == whole["trainable_parameters"][:told]
            assert told < len(whole["trainable_parameters"]) or found == whole
        reported = self.report is not None and (out / self.report).exists()
        if reported:
            assert self.report is not None
            assert (out / self.report).read_text(encoding="utf-8").rstrip().endswith("</html>")
        return (len(tasks), told, reported)

    def finish(self, out: Path, where: str) -> None:
        """Go on after a death, or begin where nothing was begun: the end is that of the uninterrupted run."""
        (self.resume if out.exists() else self.start)(out)
        assert self.state(out) == self.state(self.whole), where
        assert tree(out) == tree(self.whole), where


CLOCK = ("seconds", "cpu_seconds", "started", "finished", "computed")
"""Figures of what it cost; "computed": of features that were remembered a resumed run makes those of old tasks anew."""


def timeless(plain: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in plain.items() if not key.startswith(CLOCK)}


def saved(task: Path) -> dict[str, object]:
    """Everything in a task's folder by name: bytes, or of its row all but the clock."""
    files = {str(path.relative_to(task)): path.read_bytes() for path in sorted(task.rglob("*")) if path.is_file()}
    row = unsealed(json.loads(files["row.json"]), task)  # the digest covers the clock too
    return {**files, "row.json": timeless(row)}


@pytest.fixture(scope="module")
def images_run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """MOS on four classes of four noisy pictures in two tasks, on timm's own tiny test model."""
    home = tmp_path_factory.mktemp("images")
    draw = np.random.default_rng(0)
    for label in range(4):
        (home / "photos" / f"class{label}").mkdir(parents=True)
        for number in range(4):
            pixels = draw.integers(0, 256, (16, 16, 3)).astype(np.uint8)
            Image.fromarray(pixels).save(home / "photos" / f"class{label}" / f"{number}.png")
    torch.manual_seed(0)
    state = timm.create_model("test_vit", pretrained=False).state_dict()
    save_file({key: value.contiguous() for key, value in state.items()}, home / "weights.safetensors")
    experiment = resolve(
        "mos",
        f"folder:{home / 'photos'}",
        backbone="timm:test_vit",
        weights=str(home / "weights.safetensors"),
        settings={"img_size": 32, "benchmark.tasks": 2, "train_epochs": 1, "train_mb_size": 8, "alignment.epochs": 1},
    )
    runner.run(experiment, home / "whole")

    def read(out: Path) -> dict[str, Any]:
        run_results.read(out)
        return timeless(json.loads((out / "results.json").read_text()))

    return Run(
        lambda out: runner.run(experiment, out), runner.resume, "results.json", read, "report.html", home / "whole"
    )


@pytest.fixture(scope="module")
def texts_run(tiny_decoder: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Instruction tuning with an adapter per task, on two tasks of two examples."""
    home = tmp_path_factory.mktemp("texts")
    (home / "tasks").mkdir()
    for name, answers in (("mood", ("yes", "no")), ("colour", ("red", "blue"))):
        lines = [json.dumps({"prompt": f"the {name} of {answer}", "answer": answer}) for answer in answers]
        for split in ("train", "test"):
            (home / "tasks" / f"{name}.{split}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    experiment = instruct.InstructExperiment(
        method="retrieve",
        model=f"hf:{tiny_decoder('llama')}",
        data=str(home / "tasks"),
        settings={"epochs": 1, "batch": 2, "max_new_tokens": 2},
    )
    instruct.run(experiment, home / "whole")

    def read(out: Path) -> dict[str, Any]:
        instruct_results.read(out)
        return timeless(json.loads((out / "instruct.json").read_text()))

    return Run(lambda out: instruct.run(experiment, out), instruct.resume, "instruct.json", read, None, home / "whole")


@pytest.fixture(params=["images", "texts"])
def kind(request: pytest.FixtureRequest) -> Run:
    made: Run = request.getfixturevalue(f"{request.param}_run")
    return made


def test_a_run_seen_at_every_step(kind: Run, tmp_path: Path) -> None:
    """All copies are read. Those of one state differ in hidden leftovers only; the last, with the most, is resumed."""
    home = tmp_path / "home"
    home.mkdir()
    photos = photographed(lambda: kind.start(home / "run"), home, tmp_path / "photos")
    last = {kind.state(photo / "run"): photo for photo in photos}
    states = [(-1, 0, False), (0, 0, False), (1, 0, False), (1, 1, False), (2, 1, False), (2, 2, False)]
    assert list(last) == states + ([] if kind.report is None else [(2, 2, True)])
    for state, photo in last.items():
        kind.finish(photo / "run", f"{photo.name}, {state}")


@pytest.mark.slow
def test_a_run_resumed_after_every_step(kind: Run, tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    for photo in photographed(lambda: kind.start(home / "run"), home, tmp_path / "photos"):
        kind.finish(photo / "run", photo.name)


@pytest.mark.parametrize("points", [(45,), pytest.param(EVERY, marks=pytest.mark.slow)], ids=["one", "every"])
def test_a_run_killed(kind: Run, tmp_path: Path, points: Sequence[int]) -> None:
    """Really killed, so also with the lock of a process that is gone."""
    out = tmp_path / "home" / "run"
    (tmp_path / "empty").mkdir()
    for where in deaths(lambda: fresh(tmp_path / "empty", out.parent), lambda: kind.start(out), points):
        kind.state(out)
        kind.finish(out, where)


@pytest.mark.parametrize("points", [(4, 30), pytest.param(EVERY, marks=pytest.mark.slow)], ids=["two", "every"])
def test_a_run_on_a_full_disk(kind: Run, tmp_path: Path, points: Sequence[int]) -> None:
    """It ends with one error, leaves no scratch, and goes on when there is space."""
    out = tmp_path / "home" / "run"
    (tmp_path / "empty").mkdir()
    for where, refused in full_disks(lambda: fresh(tmp_path / "empty", out.parent), lambda: kind.start(out), points):
        kind.state(out)
        assert tree(out.parent) <= {"run"} | {f"run/{name}" for name in tree(kind.whole)}, where
        if refused:
            kind.finish(out, where)


def test_a_finished_run_where_the_disk_is_full(kind: Run, tmp_path: Path) -> None:
    """Resuming it writes results and report again: the old ones stay until the new are whole."""
    run, refusals = tmp_path / "home" / "run", []
    for where, refused in full_disks(lambda: fresh(kind.whole, run), lambda: kind.resume(run), (1, 2, 3)):
        assert kind.state(run) == kind.state(kind.whole), where
        refusals.append(refused)
    assert refusals[0]
