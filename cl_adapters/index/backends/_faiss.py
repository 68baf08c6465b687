"""The only file that imports faiss: the library on first use, and its global settings around a call."""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from cl_adapters.errors import ConfigError
from cl_adapters.index.backends.base import Ids, Metric

GEMM_FROM = 20
"""Queries from which faiss multiplies matrices instead of scanning; faiss-cpu 1.15 sets 128000, which is never."""


@functools.cache
def library() -> Any:
    """The faiss module (imported late: 0.1 s that the exact back-end does not need).

    Raises:
        ConfigError: it is not installed.
    """
    try:
        import faiss
    except ImportError as error:
        raise ConfigError(
            f"this index back-end needs faiss, which cannot be imported ({error}): pip install faiss-cpu, or take "
            "backend='exact'"
        ) from error
    return faiss


def metric_of(metric: Metric) -> int:
    """The library's number of a metric."""
    faiss = library()
    return int({"ip": faiss.METRIC_INNER_PRODUCT, "l2": faiss.METRIC_L2}[metric])


def to_scores(values: Any, metric: Metric) -> Any:
    """Higher is better: the library's squared distances change their sign."""
    return values if metric == "ip" else -values


def id_bitmap(ids: Ids, length: int) -> Any:
    """A selector of ids; it keeps its bits alive, and search parameters keep the selector.

    Args:
        ids: int64, in [0, length).
        length: one more than the largest id that can be asked for.
    """
    mask = np.zeros(length, bool)
    mask[ids] = True
    return library().IDSelectorBitmap(np.packbits(mask, bitorder="little"))


class _Gemm:
    """Matrix products for batches while at least one call is inside; then faiss's own setting again.

    The setting is one global of the library. Counting calls, instead of a lock around each, lets searches run side by
    side.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._before = 0

    def __enter__(self) -> None:
        settings = library().cvar
        with self._lock:
            if self._inside == 0:
                self._before = settings.distance_compute_blas_threshold
                settings.distance_compute_blas_threshold = GEMM_FROM
            self._inside += 1

    def __exit__(self, *failure: object) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0:
                library().cvar.distance_compute_blas_threshold = self._before


_gemm = _Gemm()


@contextmanager
def settings(threads: int, rows: int) -> Iterator[None]:
    """Run a block with that many OpenMP threads (a setting of the calling thread), and with matrix products.

    Args:
        threads: at least 1.
        rows: queries or training points of the call; below ``GEMM_FROM`` the global is left alone.
    """
    faiss = library()
    before = faiss.omp_get_max_threads()
    if before != threads:
        faiss.omp_set_num_threads(threads)
    try:
        if rows < GEMM_FROM:
            yield
        else:
            with _gemm:
                yield
    finally:
        if before != threads:
            faiss.omp_set_num_threads(before)
