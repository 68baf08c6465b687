"""Full scans by faiss: of the vectors as they are, in half precision, or in 8 bits per number."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from cl_adapters.errors import DataError, StorageError
from cl_adapters.index.arrays import read_array, write_array
from cl_adapters.index.backends._faiss import id_bitmap, library, metric_of, settings, to_scores
from cl_adapters.index.backends.base import Floats, Ids, IndexBackend, indexes


@indexes.register("flat")
class Flat(IndexBackend):
    """faiss IndexFlat: scans every vector; batches are matrix products."""

    summary = "faiss, full scan; 4 bytes per number"
    exact = True
    coding: ClassVar[str] = ""
    """Name of the scalar quantiser; empty: float32."""

    def _build(self, vectors_MD: Floats, ids_M: Ids) -> None:
        self._fill(vectors_MD)

    def _add(self, vectors_MD: Floats, ids_M: Ids) -> None:
        if self._codes_fit(vectors_MD):
            self._index.add(vectors_MD)
        else:
            stored = self._index.reconstruct_n(0, len(self)) if len(self) else vectors_MD[:0]
            self._fill(np.concatenate([stored, vectors_MD]))

    def _remove(self, ids: Ids) -> None:
        self._index.remove_ids(library().IDSelectorBatch(np.flatnonzero(np.isin(self.ids_M, ids))))

    def _search(self, queries_BD: Floats, k: int, allowed: Ids | None) -> tuple[Floats, Ids]:
        parameters = None
        if allowed is not None:
            rows = np.flatnonzero(np.isin(self.ids_M, allowed))
            parameters = library().SearchParameters(sel=id_bitmap(rows, len(self)))
        with settings(self._threads(), len(queries_BD)):
            values_BK, rows_BK = self._index.search(queries_BD, k, params=parameters)
        return to_scores(values_BK, self.metric), self.ids_M[rows_BK]

    @property
    def nbytes(self) -> int:
        """Codes and ids."""
        return int(self._index.ntotal * self._index.code_size + self.ids_M.nbytes)

    def _save(self, folder: Path) -> None:
        codes = library().vector_to_array(self._index.codes).reshape(len(self), self._index.code_size)
        write_array(folder / "codes.npy", codes)
        write_array(folder / "trained.npy", self._trained())

    def _load(self, folder: Path, state: Mapping[str, Any], mmap: bool) -> None:
        self._index = self._empty()
        self._set_trained(read_array(folder / "trained.npy", np.float32, (None,), mmap=False))
        codes = read_array(folder / "codes.npy", np.uint8, (len(self), self._index.code_size), mmap=True)
        if len(self):
            if not self._index.is_trained:
                raise StorageError("trained.npy has no numbers, without which the codes mean nothing")
            self._index.add_sa_codes(np.array(codes))

    def _fill(self, vectors_MD: Floats) -> None:
        self._index = self._empty()
        if len(vectors_MD):
            self._codes_check(vectors_MD)
            with settings(self._threads(), len(vectors_MD)):
                self._index.train(vectors_MD)
            self._index.add(vectors_MD)

    def _empty(self) -> Any:
        faiss = library()
        if not self.coding:
            return faiss.IndexFlat(self.width, metric_of(self.metric))
        coding = getattr(faiss.ScalarQuantizer, self.coding)
        return faiss.IndexScalarQuantizer(self.width, coding, metric_of(self.metric))

    def _codes_fit(self, vectors_MD: Floats) -> bool:
        """Whether the trained code can hold new vectors."""
        return True

    def _codes_check(self, vectors_MD: Floats) -> None:
        """Refuse vectors that no training lets the code hold."""

    def _trained(self) -> Floats:
        return np.empty(0, np.float32)

    def _set_trained(self, values: Floats) -> None:
        self._index.is_trained = True


@indexes.register("fp16")
class HalfPrecision(Flat):
    """faiss IndexScalarQuantizer with half-precision numbers."""

    summary = "faiss, full scan; 2 bytes per number"
    exact = False
    rounded = True
    coding = "QT_fp16"

    def _codes_fit(self, vectors_MD: Floats) -> bool:
        self._codes_check(vectors_MD)
        return True

    def _codes_check(self, vectors_MD: Floats) -> None:
        limit = float(np.finfo(np.float16).max)
        if np.abs(vectors_MD).max(initial=0) > limit:
            raise DataError(f"half precision ends at {limit:g}, and the vectors go beyond; take another back-end")


@indexes.register("sq8")
class EightBit(Flat):
    """faiss IndexScalarQuantizer with 8 bits per number, between the least and greatest value of each dimension.

    Vectors outside that range would be clipped, so they widen it: everything is coded anew.
    """

    summary = "faiss, full scan; 1 byte per number"
    exact = False
    rounded = True
    coding = "QT_8bit"

    def _codes_fit(self, vectors_MD: Floats) -> bool:
        least_D, range_D = self._trained().reshape(2, -1)
        if len(least_D) != self.width:  # nothing was ever trained
            return False
        return bool((vectors_MD.min(0) >= least_D).all() and (vectors_MD.max(0) <= least_D + range_D).all())

    def _trained(self) -> Floats:
        values: Floats = library().vector_to_array(self._index.sq.trained)
        return values

    def _set_trained(self, values: Floats) -> None:
        if len(values) not in (0, 2 * self.width):
            raise DataError(f"8-bit ranges need {2 * self.width} numbers, got {len(values)}")
        library().copy_array_to_vector(values, self._index.sq.trained)
        self._index.is_trained = len(values) > 0
