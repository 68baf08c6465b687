"""Folders of runs: one writer at a time, and nothing half-written counts."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from cl_adapters.errors import StorageError


@contextmanager
def exclusive(out: Path) -> Iterator[None]:
    """Be the only writer of a run's folder; what a killed process left half-written in ``tasks`` is removed.

    Raises:
        StorageError: another process writes it.
    """
    try:
        with FileLock(out / ".lock", timeout=0):
            for scratch in (out / "tasks").glob(".*"):
                shutil.rmtree(scratch, ignore_errors=True)
            yield
    except Timeout as error:
        raise StorageError(f"another process is writing {out}; wait for it or stop it") from error


def complete_tasks(out: Path) -> list[Path]:
    """Folders of the complete tasks of a run, in order."""
    folders = sorted(path for path in (out / "tasks").glob("[0-9]*") if path.is_dir())
    return [path for position, path in enumerate(folders) if int(path.name) == position]
