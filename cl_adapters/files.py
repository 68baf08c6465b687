"""Small files that are either whole or not there, without torch: bytes and strict JSON."""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cl_adapters.errors import StorageError


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file atomically: a reader sees the old bytes or the new ones.

    Args:
        path: the file; missing parent folders are made.
        content: all of it.

    Raises:
        StorageError: the place cannot be written.
    """
    scratch = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with scratch.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
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


def read_json(path: Path, *, schema_version: int) -> dict[str, Any]:
    """Read a strict JSON object (no NaN) with a ``schema_version`` that this release knows.

    Args:
        path: the file.
        schema_version: the newest schema that the caller understands.

    Raises:
        StorageError: missing, not strict JSON, without a version, or written by a newer release.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse)
    except FileNotFoundError as error:
        raise StorageError(f"{path} is missing") from error
    except (OSError, ValueError) as error:
        raise StorageError(f"{path} cannot be read as JSON: {error}") from error
    version = content.get("schema_version") if isinstance(content, dict) else None
    if not isinstance(version, int) or isinstance(version, bool):
        raise StorageError(f"{path} has no schema_version; it was not written by cl-adapters")
    if version > schema_version:
        raise StorageError(
            f"{path} has schema {version}, this cl-adapters reads up to {schema_version}; upgrade cl-adapters"
        )
    assert isinstance(content, dict)
    return content


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")
