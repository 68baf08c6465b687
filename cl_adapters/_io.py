"""Files that are either whole or not there: bytes, JSON and safetensors, written beside, synced, then renamed.

No pickle is ever read: a file that is not valid safetensors or JSON is an error before any of it is used. Torch is
imported only where tensors are: pools open and reports are made without it.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import json
import os
import re
import shutil
import stat
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TypeVar

from cl_adapters._forms import shown
from cl_adapters.errors import StorageError

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")
SCRATCH = re.compile(r"\..+\.(old-)?[0-9a-f]{8}")
"""Names beside a file or folder under which it is written, or stood before; left over where a writer was killed."""
SEAL = "sha256"
"""Key of the digest that a JSON file holds of itself."""
DEEPEST = 100
"""Levels of lists and objects in a JSON file: what walks through it later must not run out of stack."""
TRIES = 60
"""How often a folder that is replaced while it is read is read anew: with the pauses, for about 9 s."""


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


def open_regular(path: Path, *, follow: bool = True) -> BinaryIO:
    """Open a file of a saved folder to read: a pipe there makes nobody wait, and a device is not read without end.

    ``follow``: whether a link may lead to it.

    Raises:
        OSError: missing, unreadable, or not a regular file.
    """
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | (0 if follow else os.O_NOFOLLOW))
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise OSError(errno.EINVAL, "it is not a regular file", str(path))
    return os.fdopen(handle, "rb")


def read_regular(path: Path) -> bytes:
    """The content of a file that :func:`open_regular` opens."""
    with open_regular(path) as file:
        return file.read()


def parse_json(content: bytes, *, parse_constant: Callable[[str], Any] | None = None, **hooks: Any) -> Any:
    """Understand strict JSON: UTF-8, and no NaN or infinity but where ``parse_constant`` says what they become.

    Raises:
        ValueError: it is none, nested too deeply, or has text that is no Unicode.
    """
    try:
        found = json.loads(content.decode("utf-8"), parse_constant=parse_constant or _refuse, **hooks)
        if b"\\ud" in content.lower():  # perhaps half of a character, with which no text can be written again
            json.dumps(json.loads(content), ensure_ascii=False).encode("utf-8")
    except RecursionError as error:
        raise ValueError(str(error)) from error
    level = list(_inside(found))
    for _ in range(DEEPEST):
        level = [(key, inner) for key, value in level for _, inner in _inside(value)]
        if not level:
            return found
    raise ValueError(f"{level[0][0]!r} is nested more than {DEEPEST} deep")


def _inside(value: Any) -> Iterable[tuple[Any, Any]]:
    if isinstance(value, dict):
        return value.items()
    return enumerate(value) if isinstance(value, list) else ()


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
        content = parse_json(read_regular(path))
    except FileNotFoundError as error:
        raise StorageError(f"{path} is missing") from error
    except (OSError, ValueError) as error:
        raise StorageError(f"{path} cannot be read as JSON: {error}") from error
    return check_schema(content, schema_version, path)


def sealed(content: Mapping[str, Any]) -> dict[str, Any]:
    """The content with the SHA-256 of what it says, whatever the order of its keys and the layout of its text."""
    return {**content, SEAL: _digest(content)}


def unsealed(content: Mapping[str, Any], where: object) -> dict[str, Any]:
    """The content of :func:`sealed`, without the digest; what earlier releases wrote has none.

    Raises:
        StorageError: the digest is another.
    """
    plain = dict(content)
    if SEAL in plain and plain.pop(SEAL) != _digest(plain):
        raise StorageError(f"{where} was altered: its SHA-256 is not the recorded one; restore a copy")
    return plain


def _digest(content: Mapping[str, Any]) -> str:
    plain = json.loads(json.dumps(content, allow_nan=False))  # keys become texts before they are sorted
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def stamp(path: Path) -> tuple[int, ...] | None:
    """Tells a file from the one that takes its place; None: it is not there."""
    try:
        now = path.stat()
    except OSError:
        return None
    return (now.st_dev, now.st_ino, now.st_size, now.st_mtime_ns, now.st_ctime_ns)


def read_settled(marker: Path, read: Callable[[], T]) -> T:
    """Read a folder that another process may replace meanwhile, anew until its files are of one state.

    Args:
        marker: a file of the folder that every save writes anew.
        read: raises StorageError where files do not fit each other.

    Raises:
        StorageError: of ``read``; or the folder was replaced again and again.
    """
    for tried in range(TRIES):
        before = stamp(marker)
        try:
            return read()
        except StorageError:
            if stamp(marker) == before:
                raise
        time.sleep(0.005 * tried)
    raise StorageError(f"{marker.parent} is saved again and again while it is read; read it when the writer is done")


@contextmanager
def new_folder(path: Path, *, replaces: tuple[str, ...] = ()) -> Iterator[Path]:
    """Yield a scratch folder that becomes ``path`` when the block ends well, and vanishes when it fails.

    Args:
        path: folder to make.
        replaces: names of files by which a folder of the same kind is known. One that has them all is swapped, as an
            empty one is; the old content goes only after the new is in place. Without any nothing is replaced.

    Raises:
        StorageError: something else is at ``path``, which stays as it is; or its parent cannot be written.
    """
    _check_place(path, replaces)
    scratch = path.parent / f".{path.name}.{uuid.uuid4().hex[:8]}"
    try:
        scratch.mkdir(parents=True)
    except OSError as error:
        raise StorageError(f"cannot write to {path.parent}: {error.strerror or error}") from error
    try:
        yield scratch
        sync_folder(scratch)
        _check_place(path, replaces)  # somebody else may have put something there meanwhile
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

    Raises:
        StorageError: a number is not finite.
    """
    from safetensors.torch import save

    check_finite(tensors, name)
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
        StorageError: missing, altered, not safetensors, or with numbers that are not finite.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        content = read_regular(path)
    except OSError as error:
        raise StorageError(f"{path} is missing or unreadable: {error.strerror or error}") from error
    if hashlib.sha256(content).hexdigest() != digest:
        raise StorageError(f"{path} was altered or truncated: its SHA-256 is not the recorded one; restore a copy")
    try:
        tensors = load(content)
    except (SafetensorError, KeyError, ValueError, RuntimeError) as error:
        raise StorageError(f"{path} is not a safetensors file: {error}") from error
    check_finite(tensors, path)
    return tensors


def check_finite(tensors: Mapping[str, Tensor], where: object, error: type[StorageError] = StorageError) -> None:
    """Check that every number is finite.

    Raises:
        StorageError: names the first tensor with NaN or infinity.
    """
    for key, value in tensors.items():
        if value.is_floating_point() and not bool(value.isfinite().all()):
            raise error(f"{where}: tensor {shown(key)} has NaN or infinite values")


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


def _check_place(path: Path, replaces: tuple[str, ...]) -> None:
    """Check that a folder may be put at ``path``; see :func:`new_folder`."""
    if not os.path.lexists(path):
        return
    if not replaces:
        raise StorageError(f"{path} exists already; choose another place or pass overwrite=True")
    if path.is_symlink():
        found = "a link"
    elif not path.is_dir():
        found = "no folder"
    else:
        missing = [name for name in replaces if (path / name).is_symlink() or not (path / name).is_file()]
        if not missing or not os.listdir(path):
            return
        found = f"a folder without a file {missing[0]}"
    raise StorageError(
        f"{path} is {found}; overwrite=True replaces only what was saved there in the same form. Choose another place, "
        "or move away what stands there"
    )


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
