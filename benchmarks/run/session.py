"""One process working on the folder of a run, task by task, with a checkpoint after each that is whole or not there.

    RUN/config.json      what is run, fingerprints of backbone and data, versions
    RUN/tasks/000/       model/ (AdapterModel) and row.json (what was measured), renamed in place when complete
    RUN/...              what the runner makes of the rows, after every task

Nothing random has to be stored: every task's randomness is derived from (seed, task), so a resumed run gives the
numbers of an uninterrupted one. One process writes at a time, and nothing half-written counts.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from filelock import FileLock, Timeout

from cl_adapters._io import SCRATCH, new_folder, read_json, sealed, unsealed, write_json
from cl_adapters._version import __version__
from cl_adapters.config import build, check_range
from cl_adapters.errors import ConfigError, StorageError, UnknownName
from cl_adapters.model.facade import AdapterModel
from cl_adapters.model.files import moved_backbone, save_model

SCHEMA = 1
MOST_THREADS = 1024

Row = dict[str, Any]
"""What a task measured, ready for JSON."""
Progress = Callable[[str, int, int], None]
"""Phase, steps done, steps of the phase."""
R = TypeVar("R")
R_contra = TypeVar("R_contra", contravariant=True)


class Listener(Protocol[R_contra]):
    """Callbacks of a run."""

    def task_started(self, task: int, tasks: int, names: list[str]) -> None:
        """A task begins."""

    def progress(self, phase: str, done: int, total: int) -> None:
        """Within a task."""

    def task_finished(self, results: R_contra) -> None:
        """A task is saved; ``results`` covers all tasks so far."""


class TaskRunner(Protocol[R]):
    """What one kind of experiment does; when, and where it is kept, is the session's.

    Attributes:
        tasks: for each task the names that callbacks are given: of its classes, or its own.
        description: the content of ``config.json``.
        row_type: a dataclass that checks a row that was read, and the number of its task.
    """

    tasks: Sequence[Sequence[str]]
    description: dict[str, Any]
    row_type: type[Any]

    @property
    def model(self) -> AdapterModel:
        """After the last task that was restored or run."""

    def restore(self, done: Sequence[Path], progress: Progress | None) -> None:
        """Be as after the complete tasks in the folders ``done``, none for a new run; report to ``progress``."""

    def run_task(self, task: int, rows: Sequence[Row]) -> Row:
        """Learn and evaluate a task, given the rows of those before it."""

    def save(self, rows: Sequence[Row], out: Path) -> R:
        """Put the rows of the finished tasks, at least one, together and write them into the folder of the run."""

    def finish(self, results: R, out: Path) -> None:
        """Write what comes once, after the last task."""


def start(runner: TaskRunner[R], out: Path, listener: Listener[R] | None) -> R:
    """Run all tasks in the new folder ``out``.

    Raises:
        StorageError: ``out`` cannot be written.
    """
    runner.restore([], _progress(listener))  # a backbone that does not fit is found before anything is written
    with new_folder(out) as folder:
        (folder / "tasks").mkdir()
        write_json(folder / "config.json", runner.description)
    return _run(runner, out, listener, restored=True)


def continue_run(runner: TaskRunner[R], out: Path, listener: Listener[R] | None, recorded: dict[str, Any]) -> R:
    """Run the tasks of ``out`` that are not complete.

    ``recorded`` is its ``config.json``, of which the results tell; ``runner`` is made of the experiment in it, on the
    same inputs (:func:`changed_inputs`).

    Raises:
        StorageError: another process is writing it, a complete task is missing or altered, or it cannot be written.
    """
    runner.description = recorded
    return _run(runner, out, listener, restored=False)


def _run(runner: TaskRunner[R], out: Path, listener: Listener[R] | None, *, restored: bool) -> R:
    with exclusive(out):
        done = complete_tasks(out)
        if len(done) > len(runner.tasks):
            raise StorageError(f"{done[len(runner.tasks)]} is no task of this run, which has {len(runner.tasks)}")
        rows = [read_row(path, runner.row_type) for path in done]
        if not restored and len(done) < len(runner.tasks):
            runner.restore(done, _progress(listener))
        for task in range(len(done), len(runner.tasks)):
            if listener is not None:
                listener.task_started(task, len(runner.tasks), list(runner.tasks[task]))
            row = {"schema_version": SCHEMA, "task": task, **runner.run_task(task, rows)}
            with new_folder(_task_folder(out, task)) as folder:
                previous = _task_folder(out, task - 1) / "model" if task else None
                save_model(runner.model, folder / "model", link_from=previous)
                write_json(folder / "row.json", sealed(row))
            rows.append(row)
            results = runner.save(rows, out)
            if listener is not None:
                listener.task_finished(results)
        results = runner.save(rows, out)
        runner.finish(results, out)
    return results


def _progress(listener: Listener[R] | None) -> Progress | None:
    return None if listener is None else listener.progress


@dataclass(frozen=True, kw_only=True)
class _Hardware:
    """What ``config.json`` says of the processor, as far as a run that goes on needs it."""

    threads: int | None = None

    def __post_init__(self) -> None:
        check_range(self, f"[1, {MOST_THREADS}]", "threads")


@dataclass(frozen=True, kw_only=True)
class _Recorded:
    """What ``config.json`` holds, for checking what was read."""

    experiment: dict[str, Any] | None = None
    instruct: dict[str, Any] | None = None
    backbone_fingerprint: str
    data_fingerprint: str
    versions: dict[str, str]
    hardware: dict[str, str | int | float | None] = field(default_factory=dict)


def describe(
    plain: Mapping[str, Any], backbone: str, data: str, packages: Sequence[str], device: str
) -> dict[str, Any]:
    """The content of ``config.json``: the experiment under a key that tells its kind, two fingerprints, versions."""
    return {
        "schema_version": SCHEMA,
        **plain,
        "backbone_fingerprint": backbone,
        "data_fingerprint": data,
        "versions": {"python": platform.python_version(), "cl-adapters": __version__}
        | {name: version(name) for name in packages},
        "hardware": {
            "machine": platform.machine(),
            "processors": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "device": device,
        },
    }


def read_recorded(out: Path) -> dict[str, Any]:
    """The checked content of a run's ``config.json``.

    Raises:
        StorageError: there is none, or it is not what :func:`describe` gives.
    """
    path = out / "config.json"
    content = read_json(path, schema_version=SCHEMA)
    with read_from(path):
        _check(_Recorded, content)
        _check(_Hardware, content.get("hardware", {}))
    return content


def read_row(folder: Path, row_type: type[Any]) -> Row:
    """The checked row of a complete task; rows of earlier releases have no checksum.

    Raises:
        StorageError: missing, altered, or of another task.
    """
    path = folder / "row.json"
    row = unsealed(read_json(path, schema_version=SCHEMA), path)
    with read_from(path):
        _check(row_type, row)
        if row["task"] != int(folder.name):
            raise ConfigError(f"task is {row['task']}, expected {int(folder.name)}")
    return row


@contextmanager
def read_from(path: Path) -> Iterator[None]:
    """Errors in settings or measurements become those of the file that they were read from.

    Raises:
        StorageError: in place of ConfigError and UnknownName.
    """
    try:
        yield
    except (ConfigError, UnknownName) as error:
        raise StorageError(f"{path} is not what a run of this cl-adapters writes: {error}; restore a copy") from error


def threads_of(recorded: Mapping[str, Any]) -> int | None:
    """The CPU threads that a run computed with; None: it is of a release that did not record them."""
    threads: int | None = recorded.get("hardware", {}).get("threads")
    return threads


@contextmanager
def recorded_threads(recorded: Mapping[str, Any], threads: int | None) -> Iterator[None]:
    """Compute with the CPU threads of the run, on whose number the last bits of sums depend; put them back after.

    ``threads`` are those that were asked for, which win.
    """
    before, then = torch.get_num_threads(), threads_of(recorded)
    if then is not None and threads not in (None, then):
        warnings.warn(
            f"this run computed with {then} CPU threads and goes on with {threads}: bits may differ", stacklevel=4
        )
    torch.set_num_threads(threads or then or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def refuse_taken(out: Path, go_on: str) -> None:
    """Refuse the folder of a new run if there is something.

    Raises:
        StorageError: with ``go_on``, the command for a run that is there; or the name can be none.
    """
    try:
        taken = out.exists()
    except OSError as error:  # too long
        raise StorageError(f"cannot write {out}: {error.strerror}") from error
    if taken:
        raise StorageError(f"{out} exists already: {go_on}, or choose another --out")


def _check(cls: type[Any], content: Mapping[str, Any]) -> None:
    """Check the entries of which ``cls`` knows; others are of no matter."""
    build(cls, {entry.name: content[entry.name] for entry in fields(cls) if entry.name in content})


def changed_inputs(recorded: Mapping[str, Any], now: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Key, value then and value now of each fingerprint of ``config.json`` that is another."""
    keys = ("backbone_fingerprint", "data_fingerprint")
    return [(key, recorded[key], now[key]) for key in keys if recorded[key] != now[key]]


@contextmanager
def exclusive(out: Path) -> Iterator[None]:
    """Be the only writer of a run's folder; what a killed process left half-written in it is removed.

    Raises:
        StorageError: another process writes it, or it cannot be written.
    """
    try:
        (out / "tasks").mkdir(exist_ok=True)
        held = FileLock(out / ".lock").acquire(timeout=0)
    except Timeout as error:
        raise StorageError(f"another process is writing {out}; wait for it or stop it") from error
    except OSError as error:
        raise StorageError(f"cannot write {out}: {error.strerror or error}") from error
    with held:
        for scratch in (out / "tasks").glob(".*"):
            shutil.rmtree(scratch, ignore_errors=True)
        for left in out.iterdir():  # of results and report
            if SCRATCH.fullmatch(left.name):
                left.unlink(missing_ok=True)
        yield


def complete_tasks(out: Path) -> list[Path]:
    """Folders of the complete tasks of a run, in order; other names than those of tasks are not the run's.

    Raises:
        StorageError: one is missing, but a later one is there.
    """
    named = (path for path in (out / "tasks").glob("*") if re.fullmatch("[0-9]{3,}", path.name))
    done = sorted(named, key=lambda path: int(path.name))
    for position, path in enumerate(done):
        if path != _task_folder(out, position):
            raise StorageError(
                f"{_task_folder(out, position)} is missing, but {path.name} is there: restore a copy of it, or move "
                f"{path.name} and what follows away and go on from task {position} by resuming the run"
            )
    return done


def latest_model(out: Path, weights: Path | None = None) -> AdapterModel:
    """The model after the last complete task of a run; ``weights`` of the backbone where they have moved.

    Raises:
        StorageError: no run there, or no task is complete.
    """
    read_recorded(out)
    done = complete_tasks(out)
    if not done:
        raise StorageError(f"{out} has no complete task yet; go on with `cl-adapters resume {out}`")
    model = done[-1] / "model"
    return AdapterModel.load(model, None if weights is None else moved_backbone(model, weights))


def _task_folder(out: Path, task: int) -> Path:
    return out / "tasks" / f"{task:03d}"
