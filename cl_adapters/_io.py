"""Files that are either whole or not there: bytes, JSON and safetensors, written beside, synced, then renamed.

No pickle is ever read: a file that is not valid safetensors or JSON is an error before any of it is used. Torch is
imported only where tensors are: pools open and reports are made without it.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cl_adapters.errors import StorageError

if TYPE_CHECKING:
    from torch import Tensor


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file (and missing parent folders) atomically: a reader sees the old bytes or the new ones.

    Raises:
        StorageError: the place cannot be written.
    """
    scratch = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            _put(scratch, content)
            scratch.replace(path)
        finally:
            scratch.unlink(missing_ok=True)
    except OSError as error:
        raise StorageError(f"cannot write {path}: {error.strerror or error}") from error


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write strict JSON (no NaN) atomically.

    Raises:
        StorageError: the place cannot be written.
    """
    write_bytes(path, (json.dumps(content, indent=1, allow_nan=False) + "\n").encode())


def parse_json(content: bytes, *, parse_constant: Callable[[str], Any] | None = None, **hooks: Any) -> Any:
    """Understand strict JSON: UTF-8, and no NaN or infinity but where ``parse_constant`` says what they become.

    Raises:
        ValueError: it is none, or nested too deeply.
    """
    try:
        return json.loads(content.decode("utf-8"), parse_constant=parse_constant or _refuse, **hooks)
    except RecursionError as error:
        raise ValueError(str(error)) from error


def check_schema(content: Any, newest: int, where: object, error: type[StorageError] = StorageError) -> dict[str, Any]:
    """The content of a file, if it is a JSON object with a ``schema_version`` of at most ``newest``.

    Raises:
        StorageError: no object, without a version, or written by a newer release.
    """
    version = content.get("schema_version") if isinstance(content, dict) else None
    if not isinstance(version, int) or isinstance(version, bool) or version < 0:
        raise error(f"{where} has no schema_version; it was not written by cl-adapters")
    if version > newest:
        raise error(f"{where} has schema {version}, this cl-adapters reads up to {newest}; upgrade cl-adapters")
    assert isinstance(content, dict)
    return content


def read_json(path: Path, *, schema_version: int) -> dict[str, Any]:
    """Read a strict JSON object (no NaN) from a file of at most the schema ``schema_version``.

    Raises:
        StorageError: missing, not strict JSON, without a version, or written by a newer release.
    """
    try:
        content = parse_json(path.read_bytes())
    except FileNotFoundError as error:
        raise StorageError(f"{path} is missing") from error
    except (OSError, ValueError) as error:
        raise StorageError(f"{path} cannot be read as JSON: {error}") from error
    return check_schema(content, schema_version, path)


@contextmanager
def new_folder(path: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yield a scratch folder that becomes ``path`` when the block ends well, and vanishes when it fails.

    With ``overwrite`` an existing one is swapped; the old content goes only after the new is in place.

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
        sync_folder(scratch)
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
    from safetensors.torch import save

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
    _put(path, content)
    return digest


def get_tensors(path: Path, digest: str) -> dict[str, Tensor]:
    """Read tensors, checking the file against its SHA-256.

    Raises:
        StorageError: missing, altered, or not safetensors.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

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


def sync_folder(folder: Path) -> None:
    """Make the names in a folder survive a power cut.

    Raises:
        StorageError: the disk refuses it.
    """
    try:
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    except OSError as error:
        raise StorageError(f"cannot write {folder}: {error.strerror or error}") from error


def _put(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


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
