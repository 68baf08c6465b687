"""The pool's files: opened without following links, checked before they are believed.

A tensor file is looked at in this order: it is a regular file of the pool's own; the header of a safetensors file
fits into it and declares exactly the bytes that are there; the SHA-256 is that of its name. Only then are its bytes
made into tensors.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from cl_adapters._io import open_regular, sync_folder, write_bytes
from cl_adapters.errors import PoolError
from cl_adapters.pool.header import Header, header_length, parse_header

if TYPE_CHECKING:
    from torch import Tensor

FOLDERS = ("adapters", "knowledge")

Check = Callable[[Header], object]
"""Raises PoolError when the declared tensors are not what is wanted."""


def read_file(pool: Path, name: str) -> bytes:
    """Read a file of the pool.

    Raises:
        PoolError: missing, unreadable, a link, or not a regular file.
    """
    with _opened(pool, name) as file:
        return file.read()


def read_blob(pool: Path, name: str, sha: str, check: Check | None = None) -> bytes:
    """Read a tensor file; ``check`` looks at the declared tensors before the rest of the file is read.

    Raises:
        PoolError: missing, a link, not safetensors, truncated or altered.
    """
    with _opened(pool, name) as file:
        _look(file, check, pool / name)
        content = file.read()
        if sha_of(content) != sha:
            raise _altered(pool / name)
    return content


def check_blob(pool: Path, name: str, sha: str, check: Check | None = None) -> None:
    """Everything that :func:`read_blob` checks, in little memory."""
    with _opened(pool, name) as file:
        _look(file, check, pool / name)
        digest = hashlib.sha256()
        while piece := file.read(1 << 20):
            digest.update(piece)
        if digest.hexdigest() != sha:
            raise _altered(pool / name)


def write_blob(pool: Path, place: Callable[[str], str], content: bytes) -> str:
    """Store a tensor file under its SHA-256, which is returned; bytes that are there already are not written again.

    :func:`sync_folders` has to follow before anything names the file.

    ``place``: path below the pool for a SHA-256.

    Raises:
        PoolError: the folder is a link.
        StorageError: it cannot be written.
    """
    sha = sha_of(content)
    path = pool / place(sha)
    check_folder(path.parent)
    try:
        check_blob(pool, place(sha), sha)
    except PoolError:  # not there, or damaged: this mends it
        write_bytes(path, content)
    return sha


def sync_folders(pool: Path) -> None:
    """Make the names of new tensor files survive a power cut."""
    for folder in FOLDERS:
        if (pool / folder).is_dir():
            sync_folder(pool / folder)
    sync_folder(pool)  # a folder may be new


def sha_of(content: bytes) -> str:
    """SHA-256 in hexadecimal digits."""
    return hashlib.sha256(content).hexdigest()


def to_bytes(tensors: Mapping[str, Tensor]) -> bytes:
    """Tensors as a safetensors file; the same tensors give the same bytes."""
    import torch
    from safetensors.torch import save

    # clones, because the format refuses tensors that share memory
    whole = {key: tensors[key].detach().cpu().clone(memory_format=torch.contiguous_format) for key in sorted(tensors)}
    return bytes(save(whole))


def from_bytes(content: bytes, where: str) -> dict[str, Tensor]:
    """Tensors of a safetensors file.

    Raises:
        PoolError: it is none.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        return dict(load(content))
    except (SafetensorError, KeyError, ValueError, RuntimeError) as error:
        raise PoolError(f"{where} is not a safetensors file: {error}") from error


def orphans(pool: Path, named: frozenset[str]) -> tuple[str, ...]:
    """Files of the pool that no record names, sorted: left by a writer that was killed. Paths are below the pool."""
    found = [path.name for name in ("manifest", "model") for path in pool.glob(f".{name}.json.*")]
    for folder in FOLDERS:
        if not (pool / folder).is_symlink() and (pool / folder).is_dir():
            with os.scandir(pool / folder) as entries:
                found += [f"{folder}/{entry.name}" for entry in entries if not entry.is_dir(follow_symlinks=False)]
    return tuple(sorted(set(found) - named))


def delete(pool: Path, name: str) -> None:
    """Delete a file of the pool (a link itself, not what it points at).

    Raises:
        PoolError: it cannot be deleted; ``gc`` tries again.
    """
    path = pool / name
    check_folder(path.parent)
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise PoolError(f"{path} could not be deleted ({error.strerror}); run gc on the pool later") from error


def check_folder(path: Path) -> None:
    """Check that a folder of the pool is its own.

    Raises:
        PoolError: it is a link.
    """
    if path.is_symlink():
        raise PoolError(f"{path} is a link that leads out of the pool; put the files themselves there")


@contextmanager
def _opened(pool: Path, name: str) -> Iterator[BinaryIO]:
    """A regular file of the pool; links and pipes are refused, so nothing outside is read and nothing waits."""
    path = pool / name
    if path.parent != pool:  # the pool itself may be reached by a link
        check_folder(path.parent)
    try:
        file = open_regular(path, follow=False)
    except OSError as error:
        if path.is_symlink():
            raise PoolError(f"{path} is a link; the pool reads only files of its own") from error
        raise PoolError(f"{path} is missing or unreadable: {error.strerror or error}") from error
    with file:
        yield file


def _look(file: BinaryIO, check: Check | None, where: Path) -> None:
    """Check the header of an opened file and go back to its beginning."""
    size = os.fstat(file.fileno()).st_size
    head = file.read(8)
    head += file.read(header_length(head, size, where))
    header = parse_header(head, size, where)
    if check is not None:
        check(header)
    file.seek(0)


def _altered(where: Path) -> PoolError:
    return PoolError(f"{where} was altered: its SHA-256 is not the recorded one; restore a copy, or remove the adapter")
