"""The manifest as it stands on disk: readers see the newest without a lock, writers change it one at a time."""

from __future__ import annotations

import dataclasses
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from filelock import BaseFileLock, FileLock, Timeout

from cl_adapters._io import stamp
from cl_adapters.errors import PoolError
from cl_adapters.pool.blobs import delete
from cl_adapters.pool.manifest import MANIFEST, SCHEMA, Manifest, load_manifest, parse_manifest, write_manifest

LOCK = ".lock"
Change = Callable[[Manifest], Manifest]


@contextmanager
def locked(pool: Path, timeout: float, lock: BaseFileLock | None = None) -> Iterator[None]:
    """Be the pool's only writer for the ``with`` block.

    Args:
        pool: its folder.
        timeout: seconds to wait for another writer.
        lock: the pool's, which a thread that holds it may take again; default a new one.

    Raises:
        PoolError: the other writer took longer, or the pool cannot be written.
    """
    path = pool / LOCK
    if path.is_symlink():
        raise PoolError(f"{path} is a link; remove it")
    lock = FileLock(str(path)) if lock is None else lock
    try:
        lock.acquire(timeout=timeout)
    except Timeout as error:
        raise PoolError(
            f"another process is writing to {pool}; waited {timeout:g} s for it. Try again, or open the pool with a "
            "longer timeout"
        ) from error
    except OSError as error:
        raise PoolError(f"cannot write to {pool}: {error.strerror or error}") from error
    try:
        yield
    finally:
        lock.release()


class Disk:
    """The manifest of one pool, parsed again only when it has changed.

    A change waits ``timeout`` seconds for another writer.
    """

    def __init__(self, path: Path, timeout: float) -> None:
        self.path = path
        self.timeout = timeout
        self._lock: tuple[int, BaseFileLock | None] = (0, None)  # process, and its lock
        self._guard = threading.Lock()
        self._seen: tuple[bytes, Manifest] | None = None
        self._stamp: tuple[int, ...] | None = None

    def locked(self) -> AbstractContextManager[None]:
        """As :func:`locked`; this thread's changes within the ``with`` block are made under the same lock."""
        if self._lock[0] != os.getpid():  # a lock is of no use in a process that inherited it
            self._lock = (os.getpid(), FileLock(str(self.path / LOCK)))
        return locked(self.path, self.timeout, self._lock[1])

    def manifest(self) -> Manifest:
        """The newest manifest: it is replaced as a whole, so it is always one that a writer finished.

        Raises:
            PoolError: there is none, or it is damaged.
        """
        now = stamp(self.path / MANIFEST)
        with self._guard:
            if now is None or now != self._stamp or self._seen is None:
                self._read()
                self._stamp = now  # taken before reading: a change in between is seen the next time
            assert self._seen is not None
            return self._seen[1]

    def change(self, edit: Change) -> Manifest:
        """Change the manifest as the only writer, then delete the files that no record names any more.

        Args:
            edit: from the newest manifest to the new one; stores new files itself, and may raise to change nothing.

        Raises:
            PoolError: another writer took longer than the timeout; or what ``edit`` raises.
            StorageError: it cannot be written; the old state still stands.
        """
        with self.locked():
            with self._guard:
                before = self._read()
            after = dataclasses.replace(edit(before), schema_version=SCHEMA)
            if after.entries != before.entries or before.schema_version != SCHEMA:
                content = write_manifest(self.path, after)
                with self._guard:
                    self._seen, self._stamp = (content, after), None
            for name in sorted(before.files - after.files):
                delete(self.path, name)
        return after

    def _read(self) -> Manifest:
        """Read under the guard; the same bytes are not parsed twice."""
        content = load_manifest(self.path)
        if self._seen is None or self._seen[0] != content:
            self._seen = (content, parse_manifest(content, self.path / MANIFEST))
        return self._seen[1]
