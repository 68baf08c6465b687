"""Arrays on disk as .npy, without pickle: a header of plain text and raw numbers."""

from __future__ import annotations

from pathlib import Path
from tokenize import TokenError
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from cl_adapters._io import open_regular
from cl_adapters.errors import StorageError

ALWAYS = 64 << 20
"""Bytes up to which a file is read whole and checked whenever it is opened; larger ones are raw numbers."""


def write_array(path: Path, array: npt.NDArray[Any]) -> None:
    """Write an array of numbers (into an unfinished folder: neither atomic nor synced by itself)."""
    with path.open("wb") as file:
        array = np.ascontiguousarray(array)
        np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(array))
        write_numbers(file, array)


def write_numbers(file: BinaryIO, array: npt.NDArray[Any]) -> None:
    """Write the numbers of an array; ``tofile``, and with it ``np.save``, loses up to 4 KiB silently on a full disk."""
    file.write(np.ascontiguousarray(array).data)


def read_array(path: Path, dtype: Any, shape: tuple[int | None, ...], *, mmap: bool) -> npt.NDArray[Any]:
    """Read or memory-map an array.

    Args:
        path: a .npy file.
        dtype: what it must hold.
        shape: what it must measure; None is any length.
        mmap: return a view of the file (writing to it would not reach the file) instead of a copy in memory.

    Raises:
        StorageError: missing, truncated (also: a header that promises more than the file holds), of another type or
            shape; or with numbers that are not finite, where it is small enough to be read whole.
    """
    try:
        # Mapped first in any case: a huge promised size then fails on the file's size, before memory is asked for.
        with open_regular(path):  # a pipe or device is refused before NumPy waits for it
            array = np.lib.format.open_memmap(path, mode="c")
    except (OSError, ValueError, EOFError, SyntaxError, OverflowError, TokenError) as error:
        raise StorageError(f"{path} is missing, damaged or no .npy array: {error}") from error
    fits = array.ndim == len(shape) and all(n is None or n == m for n, m in zip(shape, array.shape, strict=True))
    if array.dtype != np.dtype(dtype) or not fits or not array.flags.c_contiguous:
        expected = [n if n is not None else "any" for n in shape]
        raise StorageError(
            f"{path} holds {array.dtype} {list(array.shape)}, expected {np.dtype(dtype)} {expected}; "
            "rebuild the index from the pool"
        )
    if array.dtype.kind == "f" and array.nbytes <= ALWAYS and not np.isfinite(array).all():
        raise StorageError(f"{path} holds numbers that are not finite; rebuild the index from the pool")
    return array if mmap else np.array(array)
