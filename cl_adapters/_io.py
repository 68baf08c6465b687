"""Files that are either whole or not there: safetensors and JSON, written beside, synced, then renamed.

No pickle is ever read: a file that is not valid safetensors or JSON is an error before any of it is used.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from cl_adapters.errors import StorageError
from cl_adapters.files import read_json, write_bytes, write_json

__all__ = ["get_tensors", "new_folder", "put_tensors", "read_json", "write_bytes", "write_json"]


@contextmanager
def new_folder(path: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yield a scratch folder that becomes ``path`` when the block ends well, and vanishes when it fails.

    Args:
        path: final place. If it exists, ``overwrite`` swaps it; the old content goes only after the new is in place.
        overwrite: allow that.

    Raises:
        StorageError: ``path`` exists, or its parent cannot be written.
    """
    if path.exists() and not overwrite:
        raise StorageError(f"{path} exists already; choose another place or pass overwrite=True")
    scratch = path.parent / f".{path.name}.{uuid.uuid4().hex[:8]}"
    try:
        scratch.mkdir(parents=True)
    except OSError as error:
        raise StorageError(f"cannot write to {path.parent}: {error.strerror or error}") from error
    try:
        yield scratch
        _sync(scratch)
        _swap(scratch, path)
    except OSError as error:
        raise StorageError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def put_tensors(folder: Path, name: str, tensors: Mapping[str, Tensor], link_from: Path | None = None) -> str:
    """Write tensors as ``folder/name`` and return the file's SHA-256.

    Args:
        folder: an unfinished folder of :func:`new_folder`.
        name: relative path.
        tensors: any device; stored as they are.
        link_from: a finished folder whose file of that name is hard-linked when it has the same bytes.
    """
    content = save({key: value.detach().cpu().contiguous() for key, value in tensors.items()})
    digest = hashlib.sha256(content).hexdigest()
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    twin = None if link_from is None else link_from / name
    if twin is not None and twin.is_file() and hashlib.sha256(twin.read_bytes()).hexdigest() == digest:
        try:
            os.link(twin, path)
            return digest
        except OSError:  # another file system, or one without links: write a copy
            pass
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    return digest


def get_tensors(path: Path, digest: str) -> dict[str, Tensor]:
    """Read tensors, checking the file against its SHA-256.

    Raises:
        StorageError: missing, altered, or not safetensors.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise StorageError(f"{path} is missing or unreadable: {error.strerror or error}") from error
    if hashlib.sha256(content).hexdigest() != digest:
        raise StorageError(f"{path} was altered or truncated: its SHA-256 is not the recorded one; restore a copy")
    try:
        return load(content)
    except SafetensorError as error:
        raise StorageError(f"{path} is not a safetensors file: {error}") from error


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _swap(scratch: Path, path: Path) -> None:
    if not path.exists():
        scratch.rename(path)
        return
    if _exchange(scratch, path):
        return  # the old content is now the scratch folder, which the caller removes
    old = path.parent / f".{path.name}.old-{uuid.uuid4().hex[:8]}"
    path.rename(old)
    try:
        scratch.rename(path)
    except BaseException:
        old.rename(path)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two folders in one step, so that a crash finds either state whole; False where the system cannot."""
    try:
        swap = ctypes.CDLL(None, use_errno=True).renameat2  # Linux
    except (OSError, AttributeError):
        return False
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return bool(swap(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0)
