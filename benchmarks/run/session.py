"""One process working on the folder of a run, task by task, with a checkpoint after each that is whole or not there.

    RUN/config.json      what is run, fingerprints of backbone and data, versions
    RUN/tasks/000/       model/ (AdapterModel) and row.json (what was measured), renamed in place when complete
    RUN/...              what the runner makes of the rows, after every task

Nothing random has to be stored: every task's randomness is derived from (seed, task), so a resumed run gives the
numbers of an uninterrupted one. One process writes at a time, and nothing half-written counts.
"""

from __future__ import annotations

import platform
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol, TypeVar

from filelock import FileLock, Timeout

from cl_adapters._io import new_folder, read_json, write_json
from cl_adapters._version import __version__
from cl_adapters.errors import StorageError
from cl_adapters.model.facade import AdapterModel
from cl_adapters.model.files import moved_backbone, save_model

SCHEMA = 1

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
    """

    tasks: Sequence[Sequence[str]]
    description: dict[str, Any]

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
        StorageError: another process is writing it.
    """
    runner.description = recorded
    return _run(runner, out, listener, restored=False)


def _run(runner: TaskRunner[R], out: Path, listener: Listener[R] | None, *, restored: bool) -> R:
    with exclusive(out):
        done = complete_tasks(out)
        rows = [read_json(path / "row.json", schema_version=SCHEMA) for path in done]
        if not restored and len(done) < len(runner.tasks):
            runner.restore(done, _progress(listener))
        for task in range(len(done), len(runner.tasks)):
            if listener is not None:
                listener.task_started(task, len(runner.tasks), list(runner.tasks[task]))
            row = {"schema_version": SCHEMA, "task": task, **runner.run_task(task, rows)}
            with new_folder(_task_folder(out, task)) as folder:
                previous = _task_folder(out, task - 1) / "model" if task else None
                save_model(runner.model, folder / "model", link_from=previous)
                write_json(folder / "row.json", row)
            rows.append(row)
            results = runner.save(rows, out)
            if listener is not None:
                listener.task_finished(results)
        results = runner.save(rows, out)
        runner.finish(results, out)
    return results


def _progress(listener: Listener[R] | None) -> Progress | None:
    return None if listener is None else listener.progress


def describe(plain: Mapping[str, Any], backbone: str, data: str, packages: Sequence[str]) -> dict[str, Any]:
    """The content of ``config.json``: the experiment under a key that tells its kind, two fingerprints, versions."""
    return {
        "schema_version": SCHEMA,
        **plain,
        "backbone_fingerprint": backbone,
        "data_fingerprint": data,
        "versions": {"python": platform.python_version(), "cl-adapters": __version__}
        | {name: version(name) for name in packages},
    }


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
        held = FileLock(out / ".lock").acquire(timeout=0)
    except Timeout as error:
        raise StorageError(f"another process is writing {out}; wait for it or stop it") from error
    except OSError as error:
        raise StorageError(f"cannot write {out}: {error.strerror or error}") from error
    with held:
        for scratch in (out / "tasks").glob(".*"):
            shutil.rmtree(scratch, ignore_errors=True)
        for scratch in out.glob(".*." + 8 * "[0-9a-f]"):  # of results and report: see write_bytes
            scratch.unlink(missing_ok=True)
        yield


def complete_tasks(out: Path) -> list[Path]:
    """Folders of the complete tasks of a run, in order."""
    folders = sorted(path for path in (out / "tasks").glob("[0-9]*") if path.is_dir())
    return [path for position, path in enumerate(folders) if int(path.name) == position]


def latest_model(out: Path, weights: Path | None = None) -> AdapterModel:
    """The model after the last complete task of a run; ``weights`` of the backbone where they have moved.

    Raises:
        StorageError: no run there, or no task is complete.
    """
    read_json(out / "config.json", schema_version=SCHEMA)
    done = complete_tasks(out)
    if not done:
        raise StorageError(f"{out} has no complete task yet; go on with `cl-adapters resume {out}`")
    model = done[-1] / "model"
    return AdapterModel.load(model, None if weights is None else moved_backbone(model, weights))


def _task_folder(out: Path, task: int) -> Path:
    return out / "tasks" / f"{task:03d}"
