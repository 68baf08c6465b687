"""Going on with a run whose files were edited, or lost: one error that names the file, never a traceback."""

from __future__ import annotations

import copy
import errno
import functools
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from typer.testing import CliRunner

from cl_adapters import _io
from cl_adapters.benchmarks.cli.root import app
from cl_adapters.benchmarks.data.folder import Folder
from cl_adapters.benchmarks.results.results import read
from cl_adapters.benchmarks.run import instruct
from cl_adapters.benchmarks.run.experiment import BackboneConfig, resolve
from cl_adapters.benchmarks.run.pool_of_run import pool_of_run
from cl_adapters.benchmarks.run.runner import latest_model, resume, run
from cl_adapters.benchmarks.run.session import read_row
from cl_adapters.errors import ClAdaptersError, StorageError

Mutation = Callable[[Any], Any]
MUTATIONS: dict[str, Any] = {
    "null": None,
    "a word": "x",
    "a number": 7,
    "a list": [None, {"x": 1}],
    "a mapping": {"x": [None]},
    "negative": -1,
    "huge": 10**30,
    "true": True,
    "too long": ["x"] * 9,
    "NaN": math.nan,
}
REMOVED = object()


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run of two tasks, with an adapter for each."""
    root = tmp_path_factory.mktemp("altered")
    torch.manual_seed(0)
    state = timm.create_model("test_vit", pretrained=False).state_dict()
    save_file({key: value.contiguous() for key, value in state.items()}, root / "w.safetensors")
    draw = np.random.default_rng(0)
    for label in range(4):
        (root / "photos" / f"class{label}").mkdir(parents=True)
        for i in range(4):
            pixels = draw.integers(0, 256, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / "photos" / f"class{label}" / f"{i}.png")
    chosen = resolve(
        "mos",
        f"folder:{root / 'photos'}",
        backbone="timm:test_vit",
        weights=str(root / "w.safetensors"),
        settings={"img_size": 32, "benchmark.tasks": 2, "train_epochs": 1, "alignment.epochs": 1},
    )
    run(chosen, root / "run")
    return root / "run"


@pytest.fixture
def out(finished: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Backbone and data are loaded once for each configuration, and no report is written."""
    monkeypatch.setattr("cl_adapters.benchmarks.run.runner.write_report", lambda *given: None)
    monkeypatch.setattr(BackboneConfig, "load", functools.cache(BackboneConfig.load))
    monkeypatch.setattr(Folder, "load", functools.cache(Folder.load))


def places(content: Any, way: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every key, at any depth, and the first entry of every list."""
    entries = content.items() if isinstance(content, dict) else list(enumerate(content))[:1]
    for key, value in entries:
        yield (*way, key)
        if isinstance(value, dict | list):
            yield from places(value, (*way, key))


def altered(content: Any, way: tuple[Any, ...], value: Any) -> Any:
    changed = copy.deepcopy(content)
    inner = functools.reduce(lambda at, key: at[key], way[:-1], changed)
    if value is REMOVED:
        del inner[way[-1]]
    else:
        inner[way[-1]] = value
    return changed


def edit(path: Path, change: Callable[[Any], Any]) -> None:
    path.write_text(json.dumps(change(json.loads(path.read_text(encoding="utf-8")))), encoding="utf-8")


@pytest.mark.parametrize("kind", ["removed", *MUTATIONS])
def test_every_edit_of_config_json_is_one_error_or_of_no_matter(kind: str, out: Path, quick: None) -> None:
    path = out / "config.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    refused = 0
    for way in places(content):
        if way == ("experiment", "backbone", "weights") and kind in ("removed", "null"):
            continue  # another backbone, from the network
        path.write_text(json.dumps(altered(content, way, MUTATIONS.get(kind, REMOVED))), encoding="utf-8")
        try:
            resume(out)
        except ClAdaptersError:
            refused += 1
        else:
            read(out)
    assert refused > 10


@pytest.mark.parametrize("kind", ["removed", *MUTATIONS])
@pytest.mark.parametrize("old", [False, True], ids=["with checksum", "of an earlier release"])
def test_every_edit_of_row_json_is_one_error_or_of_no_matter(kind: str, old: bool, out: Path, quick: None) -> None:
    path = out / "tasks" / "001" / "row.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    if old:
        del content["sha256"]
    expected, named = read(out), []
    for way in places(content):
        path.write_text(json.dumps(altered(content, way, MUTATIONS.get(kind, REMOVED))), encoding="utf-8")
        if not old and (way, kind) != (("sha256",), "removed"):
            with pytest.raises(StorageError, match=r"row\.json"):
                resume(out)
            continue
        try:
            resume(out)
        except StorageError as error:
            named.append("row.json" in str(error))
        else:
            found = read(out)
            if way[0] in ("accuracy", "routing", "passes", "task"):
                assert found == expected or kind in ("a number", "removed"), (way, kind)
    assert all(named)


@pytest.mark.parametrize("accuracy", [[50.0, 101.0], [-1.0, 3.0], [50.0], [1.0, 2.0, 3.0], [True, 3.0], ["x", 1.0]])
def test_accuracies_of_rows_without_checksum_are_checked(out: Path, accuracy: list[Any]) -> None:
    path = out / "tasks" / "001" / "row.json"
    edit(path, lambda row: {key: row[key] for key in row if key != "sha256"})
    assert read(out) == resume(out), "rows of earlier releases still load"
    edit(path, lambda row: row | {"accuracy": accuracy})
    for use in (lambda: resume(out), lambda: pool_of_run(out / "pool", out)):
        with pytest.raises(StorageError, match=r"row\.json.*accuracy"):
            use()


def test_an_accuracy_is_not_believed_if_it_was_changed(out: Path) -> None:
    path = out / "tasks" / "000" / "row.json"
    edit(path, lambda row: row | {"accuracy": [99.0]})
    with pytest.raises(StorageError, match=r"row\.json was altered"):
        resume(out)
    with pytest.raises(StorageError, match=r"row\.json was altered"):
        pool_of_run(out / "pool", out, task=0)


def test_rows_of_instruction_tuning_are_checked(tmp_path: Path) -> None:
    folder = tmp_path / "001"
    folder.mkdir()
    row = {
        "schema_version": 1, "task": 1, "likelihood": [None, None], "generation": [0.0, 100.0], "train_loss": 1.5,
        "trainable_parameters": 3, "stored_bytes": -5, "seconds": {"train": 1.0, "eval": 0.5},
    }  # fmt: skip
    path = folder / "row.json"
    path.write_text(json.dumps(row), encoding="utf-8")
    assert read_row(folder, instruct.InstructRow) == row
    for way in places(row):
        for value in (REMOVED, "x", math.nan, {"x": 1}):
            path.write_text(json.dumps(altered(row, way, value)), encoding="utf-8")
            with pytest.raises(StorageError, match=r"row\.json"):
                read_row(folder, instruct.InstructRow)
    path.write_text(json.dumps(row | {"generation": [0.0, 100.5]}), encoding="utf-8")
    with pytest.raises(StorageError, match="generation must be percentages"):
        read_row(folder, instruct.InstructRow)


def test_folders_that_are_no_tasks_are_of_no_matter(out: Path) -> None:
    expected = read(out)
    for name in ("9x", "001-copy", "7"):
        (out / "tasks" / name).mkdir()
    assert resume(out) == expected
    assert latest_model(out).num_tasks == 2


def test_a_missing_task_is_said_before_training(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.rmtree(out / "tasks" / "000")
    monkeypatch.setattr("cl_adapters.benchmarks.run.runner._Runner.run_task", None)
    for use in (lambda: resume(out), lambda: latest_model(out), lambda: pool_of_run(out / "pool", out)):
        with pytest.raises(StorageError, match=r"tasks/000 is missing, but 001 is there: restore .* go on"):
            use()
    monkeypatch.undo()
    shutil.rmtree(out / "tasks" / "001")
    assert resume(out).num_tasks == 2


def test_the_threads_of_a_run_are_those_it_goes_on_with(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    edit(out / "config.json", lambda plain: plain | {"hardware": plain["hardware"] | {"threads": 2}})
    before, used = torch.get_num_threads(), []
    shutil.rmtree(out / "tasks" / "001")
    train = resume.__globals__["_Runner"].run_task

    def noted(self: Any, *given: Any) -> Any:
        used.append(torch.get_num_threads())
        return train(self, *given)

    monkeypatch.setattr("cl_adapters.benchmarks.run.runner._Runner.run_task", noted)
    resume(out)
    assert (used, torch.get_num_threads()) == ([2], before)
    shutil.rmtree(out / "tasks" / "001")
    with pytest.warns(UserWarning, match="computed with 2 CPU threads and goes on with 3: bits may differ"):
        resume(out, threads=3)
    assert (used, torch.get_num_threads()) == ([2, 3], before)
    edit(out / "config.json", lambda plain: {key: plain[key] for key in plain if key != "hardware"})
    result = CliRunner().invoke(app, ["resume", str(out)])
    assert (result.exit_code, "note: this run does not tell its CPU threads" in result.output) == (0, True)


def test_a_full_disk_is_one_error_and_what_was_complete_stays(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = read(out)
    shutil.rmtree(out / "tasks" / "001")

    def full(path: Path, content: bytes) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(_io, "_put", full)
    with pytest.raises(StorageError, match=r"cannot write .*No space left on device"):
        resume(out)
    monkeypatch.undo()
    assert [path.name for path in (out / "tasks").iterdir()] == ["000"]
    assert resume(out).accuracy_matrix == expected.accuracy_matrix


def test_a_folder_that_cannot_be_written_is_one_error(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*given: Any, **more: Any) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr("filelock.FileLock.acquire", refuse)
    with pytest.raises(StorageError, match=r"cannot write .*Read-only file system"):
        resume(out)
    monkeypatch.undo()
    shutil.rmtree(out / "tasks")
    (out / "tasks").write_text("x", encoding="utf-8")
    with pytest.raises(StorageError, match="cannot write"):
        resume(out)
