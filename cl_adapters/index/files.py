"""An index on disk: arrays and JSON, each file with its size and SHA-256; nothing in it can run code.

    index.json       what was asked for, the records with digests, size and SHA-256 of every other file
    record.npy       int64 [M'], label.npy int64 [M']   whose key is it
    mean.npy         float32 [D], whitening.npy float32 [D, D]   the space
    backend/         what the back-end wrote

Native files of faiss are neither written nor read: a wrong one can make the library read beyond its memory.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import numpy as np

from cl_adapters import config as configs
from cl_adapters._io import SCRATCH, new_folder, open_regular, read_json, read_settled, stamp, write_json
from cl_adapters.errors import ClAdaptersError, StorageError
from cl_adapters.index.answers import IndexConfig
from cl_adapters.index.arrays import ALWAYS, read_array, write_array
from cl_adapters.index.backends.base import IndexBackend
from cl_adapters.index.contents import Contents
from cl_adapters.index.keys import KeySource
from cl_adapters.index.space import Space
from cl_adapters.index.table import KeyTable

SCHEMA_VERSION = 1


def default_folder(pool: KeySource, name: str = "default") -> Path:
    """Where an index of a pool lives unless told otherwise."""
    return Path(pool.path) / "index" / name


def index_folders(pool: Path) -> list[Path]:
    """Folders of the indexes in a pool's folder, by name; without links, and without unfinished ones."""
    return [place for place in _folders(pool) if (place / "index.json").is_file() and not SCRATCH.fullmatch(place.name)]


def unfinished_folders(pool: Path) -> list[Path]:
    """What was being written when its writer was killed, as long as the pool's lock keeps all others out."""
    return [place for place in _folders(pool) if SCRATCH.fullmatch(place.name)]


def _folders(pool: Path) -> list[Path]:
    folder = pool / "index"
    found = sorted(folder.iterdir()) if folder.is_dir() and not folder.is_symlink() else []
    return [place for place in found if place.is_dir() and not place.is_symlink()]


def save_index(
    contents: Contents, folder: Path, overwrite: bool, threshold: float | None, threshold_stale: bool
) -> None:
    """Write an index atomically; whoever has the old one open keeps it.

    Raises:
        StorageError: the place cannot be written, or holds something that is no index.
    """
    if folder.exists() and not (folder / "index.json").is_file():
        raise StorageError(f"{folder} exists and is no index; choose another place")
    with new_folder(folder, replaces=("index.json",) if overwrite else ()) as scratch:
        write_array(scratch / "record.npy", contents.table.record_of_key)
        write_array(scratch / "label.npy", contents.table.label_of_key)
        space = contents.space
        if space is not None and contents.backend is not None:
            write_array(scratch / "mean.npy", space.mean_D)
            if space.whitening_DD is not None:
                write_array(scratch / "whitening.npy", space.whitening_DD)
            (scratch / "backend").mkdir()
            contents.backend.save(scratch / "backend")
        write_json(
            scratch / "index.json",
            {
                "schema_version": SCHEMA_VERSION,
                "config": configs.to_plain(contents.config),
                "threshold": threshold,
                **({"threshold_stale": True} if threshold_stale else {}),
                "shrinkage": None if space is None else space.shrinkage,
                **contents.table.to_plain(),
                "files": {name: [path.stat().st_size, _sha256(path)] for name, path in _files(scratch).items()},
            },
        )


def open_index(folder: Path, *, mmap: bool, verify: bool) -> tuple[Contents, float | None, bool]:
    """Read an index; the options are those of :meth:`AdapterIndex.open`.

    All files are of one state: where another process has saved the index meanwhile, it is read anew.

    Returns:
        Its contents, its threshold, and whether that was calibrated on other keys.

    Raises:
        StorageError: missing, altered or contradictory files; or it is saved over and over.
    """

    def read() -> tuple[Contents, float | None, bool]:
        before = stamp(folder / "index.json")
        found = _read_index(folder, mmap=mmap, verify=verify)
        if stamp(folder / "index.json") != before:  # large files are not compared with their digests
            raise StorageError(f"{folder} was saved while it was read")
        return found

    return read_settled(folder / "index.json", read)


def _read_index(folder: Path, *, mmap: bool, verify: bool) -> tuple[Contents, float | None, bool]:
    if not (folder / "index.json").exists():
        raise StorageError(f"there is no index at {folder}; make one: cl-adapters index build, or AdapterIndex.build")
    plain = read_json(folder / "index.json", schema_version=SCHEMA_VERSION)
    try:
        _check_files(folder, plain["files"], verify)
        chosen = configs.build(IndexConfig, plain["config"], "index")
        record = read_array(folder / "record.npy", np.int64, (None,), mmap=False)
        label = read_array(folder / "label.npy", np.int64, (len(record),), mmap=False)
        contents = Contents(chosen, KeyTable.of(plain, record, label))
        if (folder / "backend").exists():
            contents.backend = IndexBackend.load(folder / "backend", mmap=mmap)
            contents.space = _read_space(folder, chosen, contents.backend, plain["shrinkage"])
            if not np.array_equal(np.sort(contents.backend.ids_M), np.flatnonzero(record >= 0)):
                raise StorageError("the back-end's keys are not those of the table")
        elif (record >= 0).any():
            raise StorageError("its vectors are missing")
        threshold = plain["threshold"]
        return contents, None if threshold is None else float(threshold), plain.get("threshold_stale") is True
    except (ClAdaptersError, KeyError, TypeError, ValueError, AttributeError, OSError) as error:
        what = str(error) if isinstance(error, ClAdaptersError) else f"index.json: {type(error).__name__} {error}"
        raise StorageError(f"{folder} is no usable index: {what}; rebuild it from the pool") from error


def _read_space(folder: Path, chosen: IndexConfig, backend: IndexBackend, shrinkage: Any) -> Space:
    width, whitening = backend.width, folder / "whitening.npy"
    space = Space(
        similarity=chosen.metric,
        mean_D=read_array(folder / "mean.npy", np.float32, (width,), mmap=False),
        whitening_DD=read_array(whitening, np.float32, (width, width), mmap=False) if whitening.exists() else None,
        shrinkage=float(shrinkage),
    )
    if space.metric != backend.metric or (chosen.metric == "mahalanobis") != (space.whitening_DD is not None):
        raise StorageError("its space does not fit its back-end")
    return space


def _check_files(folder: Path, recorded: Any, verify: bool) -> None:
    present = _files(folder)
    if set(recorded) != set(present):
        names = ", ".join(sorted(set(recorded) ^ set(present))[:3])
        raise StorageError(f"files are missing or not its own: {names}")
    for name, path in present.items():
        size, sha = recorded[name]
        found = path.stat().st_size
        if found != size:
            raise StorageError(f"{name} has {found} bytes instead of {size}")
        if (verify or found <= ALWAYS) and _sha256(path) != sha:
            raise StorageError(f"{name} was altered: its SHA-256 is not the recorded one")


def _files(folder: Path) -> dict[str, Path]:
    """All files but index.json, by name below the folder."""
    found = {str(path.relative_to(folder)): path for path in sorted(folder.rglob("*")) if not path.is_dir()}
    found.pop("index.json", None)
    return found


def _sha256(path: Path) -> str:
    """Digest of a file; a new one also gets to the disk, at no extra cost for an old one."""
    digest = hashlib.sha256()
    with open_regular(path) as file:
        while block := file.read(1 << 20):
            digest.update(block)
        os.fsync(file.fileno())
    return digest.hexdigest()
