"""The full scan, in NumPy and torch: the oracle that the other back-ends are measured against; needs no faiss."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cl_adapters.index.arrays import read_array, write_array
from cl_adapters.index.backends.base import Floats, Ids, IndexBackend, Metric, indexes

BLOCK = 1 << 16
"""Vectors per matrix product: bounds the scores held at once, and what of a memory-mapped file is read at once."""


@indexes.register("exact")
class Exact(IndexBackend):
    """Every query against every vector, by blocked matrix products."""

    summary = "full scan in torch; needs no faiss"
    exact = True

    def _build(self, vectors_MD: Floats, ids_M: Ids) -> None:
        self._vectors_MD = np.array(vectors_MD)  # a copy: the caller may write to its own

    def _add(self, vectors_MD: Floats, ids_M: Ids) -> None:
        self._vectors_MD = np.concatenate([self._vectors_MD, vectors_MD])

    def _remove(self, ids: Ids) -> None:
        self._vectors_MD = self._vectors_MD[~np.isin(self.ids_M, ids)]

    def _search(self, queries_BD: Floats, k: int, allowed: Ids | None) -> tuple[Floats, Ids]:
        rows = None if allowed is None else np.flatnonzero(np.isin(self.ids_M, allowed))
        scores_BK, found_BK = nearest(self._vectors_MD, queries_BD, k, self.metric, rows)
        return scores_BK, self.ids_M[found_BK]

    @property
    def nbytes(self) -> int:
        """Vectors and ids."""
        return int(self._vectors_MD.nbytes + self.ids_M.nbytes)

    def _save(self, folder: Path) -> None:
        write_array(folder / "vectors.npy", self._vectors_MD)

    def _load(self, folder: Path, state: Mapping[str, Any], mmap: bool) -> None:
        self._vectors_MD = read_array(folder / "vectors.npy", np.float32, (len(self), self.width), mmap=mmap)


def nearest(
    vectors_MD: Floats, queries_BD: Floats, k: int, metric: Metric, rows: Ids | None = None
) -> tuple[Floats, Ids]:
    """The k best rows of an array for every query.

    Args:
        vectors_MD: float32 [M, D], also memory-mapped.
        queries_BD: float32 [B, D].
        k: at most the number of rows.
        metric: "ip" or "l2".
        rows: int64; only these rows. None: all.

    Returns:
        scores float32 [B, k], best first, and rows int64 [B, k]. The ranking is by products in float32; the squared
        distances of the k found are then computed from differences, so that equal vectors score exactly 0.
    """
    queries = torch.from_numpy(np.array(queries_BD))
    best, which = torch.empty(len(queries), 0), torch.empty(len(queries), 0, dtype=torch.long)
    total = len(vectors_MD) if rows is None else len(rows)
    for start in range(0, total, BLOCK):
        stop = min(start + BLOCK, total)
        picked = slice(start, stop) if rows is None else rows[start:stop]
        part = vectors_MD[picked]
        block = torch.from_numpy(part if part.flags.writeable else part.copy())  # torch warns of read-only memory
        scores = queries @ block.T
        if metric == "l2":
            scores = 2 * scores - block.square().sum(1)
        top = scores.topk(min(k, stop - start), dim=1)
        place = top.indices + start if rows is None else torch.from_numpy(rows)[top.indices + start]
        best, which = torch.cat([best, top.values], 1), torch.cat([which, place], 1)
        keep = best.topk(min(k, best.shape[1]), dim=1)
        best, which = keep.values, which.gather(1, keep.indices)
    found_BK: Ids = which.numpy()
    if metric == "l2":
        return rescored(vectors_MD, queries_BD, found_BK, metric)
    return best.numpy(), found_BK


def rescored(vectors_MD: Floats, queries_BD: Floats, rows_BK: Ids, metric: Metric) -> tuple[Floats, Ids]:
    """Scores of chosen rows (from differences, for "l2"), sorted anew; rows of -1 come last with minus infinity."""
    scores_BK = np.empty(rows_BK.shape, np.float32)
    with np.errstate(over="ignore", invalid="ignore"):  # of numbers from a damaged file
        for b, rows in enumerate(rows_BK):
            chosen = vectors_MD[rows]
            if metric == "ip":
                scores_BK[b] = chosen @ queries_BD[b]
            else:
                scores_BK[b] = -np.square(chosen - queries_BD[b]).sum(1)
    scores_BK[rows_BK < 0] = -np.inf
    order = np.argsort(-scores_BK, axis=1, kind="stable")
    return np.take_along_axis(scores_BK, order, 1), np.take_along_axis(rows_BK, order, 1)
