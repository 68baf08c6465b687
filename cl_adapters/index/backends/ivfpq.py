"""Inverted lists of product-quantised vectors (Jegou et al. 2011), re-ranked by the vectors themselves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cl_adapters.errors import StorageError
from cl_adapters.index.arrays import read_array, write_array
from cl_adapters.index.backends._faiss import library, metric_of
from cl_adapters.index.backends.base import Floats, Ids, indexes
from cl_adapters.index.backends.exact import rescored
from cl_adapters.index.backends.ivf import IVF, IVFOptions

BITS = 8
"""Per sub-vector: one byte."""

TRAINING = 64 << BITS
"""Vectors that train the codes at least, where there are as many."""


@dataclass(frozen=True, kw_only=True)
class IVFPQOptions(IVFOptions):
    """Options of the product quantiser, besides those of the lists.

    Attributes:
        parts: sub-vectors, each coded in one byte; a divisor of the width; default the greatest that leaves 8 numbers
            or more per sub-vector.
        candidates: codes that are re-ranked per query, at least k; near-identical vectors have the same code, so this
            should exceed the size of a cluster.
    """

    parts: int | None = None
    candidates: int = 256

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.parts is not None and self.parts < 1) or self.candidates < 1:
            raise ValueError(f"parts and candidates must be at least 1, got {self}")


@indexes.register("ivfpq")
class IVFPQ(IVF):
    """faiss IndexIVFPQ in memory, and the vectors beside it: opened memory-mapped, only candidates' rows are read."""

    summary = "faiss, inverted lists of product codes, re-ranked; 1/32 of the memory, vectors on disk"
    Options = IVFPQOptions
    options: IVFPQOptions

    def _build(self, vectors_MD: Floats, ids_M: Ids) -> None:
        self._keep(vectors_MD, ids_M)
        super()._build(vectors_MD, ids_M)

    def _sample(self, vectors_MD: Floats, size: int) -> Floats:
        sample_SD = super()._sample(vectors_MD, max(size, TRAINING))
        # k-means wants as many vectors as codes; a small index repeats its own.
        return np.resize(sample_SD, (max(len(sample_SD), 1 << BITS), self.width))

    def _clusterings(self) -> list[Any]:
        return [self._index.cp, self._index.pq.cp]

    def _empty(self, lists: int) -> Any:
        faiss, metric = library(), metric_of(self.metric)
        self._coarse = faiss.IndexFlat(self.width, metric)
        return faiss.IndexIVFPQ(self._coarse, self.width, lists, self._parts(), BITS, metric)

    def _parts(self) -> int:
        parts = self.options.parts or max(p for p in range(1, max(1, self.width // 8) + 1) if self.width % p == 0)
        if self.width % parts:
            raise ValueError(f"parts must divide the width {self.width}, got {parts}")
        return parts

    def _add(self, vectors_MD: Floats, ids_M: Ids) -> None:
        super()._add(vectors_MD, ids_M)
        if len(self._rows_of_ids) == len(self):  # not trained anew, which keeps them all
            ids, vectors = self._stored()
            self._keep(np.concatenate([vectors, vectors_MD]), np.concatenate([ids, ids_M]))

    def _remove(self, ids: Ids) -> None:
        super()._remove(ids)
        kept = ~np.isin(self._rows_of_ids, ids)
        self._keep(self._vectors_MD[kept], self._rows_of_ids[kept])

    def _probe(self, queries_BD: Floats, k: int, probes: int, selector: Any) -> tuple[Floats, Ids]:
        wanted = min(max(self.options.candidates, k), len(self._rows_of_ids))
        _, ids_BW = super()._probe(queries_BD, wanted, probes, selector)
        rows_BW = np.searchsorted(self._rows_of_ids, ids_BW).clip(max=len(self._rows_of_ids) - 1)
        rows_BW[self._rows_of_ids[rows_BW] != ids_BW] = -1
        scores_BW, rows_BW = rescored(self._vectors_MD, queries_BD, rows_BW, self.metric)
        return scores_BW[:, :k], np.where(rows_BW < 0, -1, self._rows_of_ids[rows_BW])[:, :k]

    @property
    def nbytes(self) -> int:
        """Codes, ids, centroids, and the vectors for re-ranking."""
        return super().nbytes + int(self._vectors_MD.nbytes + self._rows_of_ids.nbytes)

    def _stored(self) -> tuple[Ids, Floats]:
        return self._rows_of_ids, self._vectors_MD

    def _keep(self, vectors_MD: Floats, ids_M: Ids) -> None:
        order = np.argsort(ids_M)
        self._rows_of_ids, self._vectors_MD = ids_M[order], vectors_MD[order]

    def _save(self, folder: Path) -> None:
        super()._save(folder)
        write_array(folder / "codebook.npy", library().vector_to_array(self._index.pq.centroids))
        write_array(folder / "rows.npy", self._rows_of_ids)
        write_array(folder / "vectors.npy", self._vectors_MD)

    def _load(self, folder: Path, state: Mapping[str, Any], mmap: bool) -> None:
        super()._load(folder, state, mmap)
        self._rows_of_ids = read_array(folder / "rows.npy", np.int64, (len(self),), mmap=False)
        self._vectors_MD = read_array(folder / "vectors.npy", np.float32, (len(self), self.width), mmap=mmap)
        if not np.array_equal(self._rows_of_ids, np.sort(self.ids_M)):
            raise StorageError(f"{folder}: rows.npy and ids.npy do not hold the same ids")

    def _load_trained(self, folder: Path, state: Mapping[str, Any]) -> None:
        size = self.width << BITS
        codebook = read_array(folder / "codebook.npy", np.float32, (size,), mmap=False)
        library().copy_array_to_vector(codebook, self._index.pq.centroids)
        self._index.precompute_table()
