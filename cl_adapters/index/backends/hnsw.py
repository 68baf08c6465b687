"""Hierarchical navigable small worlds by faiss (Malkov and Yashunin 2018): a graph that a search walks along."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cl_adapters._seeding import derive
from cl_adapters.errors import StorageError
from cl_adapters.index.arrays import read_array, write_array
from cl_adapters.index.backends._faiss import id_bitmap, library, metric_of, settings, to_scores
from cl_adapters.index.backends.base import Floats, Ids, IndexBackend, indexes

DEAD = 0.25
"""Share of removed vectors in the graph from which it is built anew."""

SCAN = 0.1
"""Share of allowed vectors below which a scan of them beats walking along the others."""


@dataclass(frozen=True, kw_only=True)
class HNSWOptions:
    """Options of the graph.

    Attributes:
        links: neighbours of a vector in each layer (twice as many in the lowest); more: better recall, more memory.
        construction: candidates looked at when a vector is linked; more: better recall, slower to build.
        search: candidates kept during a search, at least k; more: better recall, slower.
    """

    links: int = 32
    construction: int = 80
    search: int = 64

    def __post_init__(self) -> None:
        if self.links < 2 or self.construction < 1 or self.search < 1:
            raise ValueError(f"links must be at least 2, construction and search at least 1, got {self}")


@indexes.register("hnsw")
class HNSW(IndexBackend):
    """faiss IndexHNSWFlat, built on one thread (several would link in an order that differs from run to run).

    A graph cannot lose a vector: removed ones stay as way-marks that are never returned, until they are a quarter.
    """

    summary = "faiss, graph; quick to ask, slow to build, 4 bytes per number and the links"
    Options = HNSWOptions
    options: HNSWOptions

    def _build(self, vectors_MD: Floats, ids_M: Ids) -> None:
        self._index = self._empty()
        self._ids_of_row: Ids = np.empty(0, np.int64)  # -1: removed
        self._add(vectors_MD, ids_M)

    def _add(self, vectors_MD: Floats, ids_M: Ids) -> None:
        faiss = library()
        # The layers of new vectors depend on the seed and the graph's size alone, also after saving and opening.
        self._index.hnsw.rng = faiss.RandomGenerator(derive(self.seed, "hnsw", len(self._ids_of_row)))
        with settings(1, 1):
            self._index.add(vectors_MD)
        self._ids_of_row = np.concatenate([self._ids_of_row, ids_M])

    def _remove(self, ids: Ids) -> None:
        self._ids_of_row[np.isin(self._ids_of_row, ids)] = -1
        alive = self._ids_of_row >= 0
        if 1 - alive.mean() > DEAD:
            self._build(self._vectors()[alive], self._ids_of_row[alive])

    def _search(self, queries_BD: Floats, k: int, allowed: Ids | None) -> tuple[Floats, Ids]:
        faiss = library()
        total = len(self._ids_of_row)
        rows = None
        if allowed is not None:
            rows = np.flatnonzero(np.isin(self._ids_of_row, allowed))
        elif len(self) < total:
            rows = np.flatnonzero(self._ids_of_row >= 0)
        share = 1.0 if rows is None else len(rows) / total
        selector = None if rows is None else id_bitmap(rows, total)
        scan = faiss.SearchParameters(sel=selector)
        if share < SCAN:
            return self._answer(self._storage(), queries_BD, k, scan)
        # Only every 1/share-th vector on the way counts, so the walk keeps that many more.
        width = min(total, int(max(self.options.search, k) / share))
        walk = faiss.SearchParametersHNSW(efSearch=width, sel=selector)
        scores_BK, ids_BK = self._answer(self._index, queries_BD, k, walk)
        short = (ids_BK < 0).any(1)
        if short.any():
            scores_BK[short], ids_BK[short] = self._answer(self._storage(), queries_BD[short], k, scan)
        return scores_BK, ids_BK

    def _answer(self, index: Any, queries_BD: Floats, k: int, parameters: Any) -> tuple[Floats, Ids]:
        with settings(self._threads(), len(queries_BD)):
            values_BK, rows_BK = index.search(queries_BD, k, params=parameters)
        ids_BK = np.where(rows_BK < 0, -1, self._ids_of_row[rows_BK])
        return to_scores(values_BK, self.metric), ids_BK

    @property
    def nbytes(self) -> int:
        """Vectors, links and ids."""
        graph = self._index.hnsw
        links = 4 * graph.neighbors.size() + 8 * graph.offsets.size() + 4 * graph.levels.size()
        return int(links + self._index.ntotal * (4 * self.width + 8))

    def _state(self) -> Mapping[str, Any]:
        return {"entry_point": self._index.hnsw.entry_point, "max_level": self._index.hnsw.max_level}

    def _save(self, folder: Path) -> None:
        graph, to_array = self._index.hnsw, library().vector_to_array
        write_array(folder / "rows.npy", self._ids_of_row)
        write_array(folder / "vectors.npy", self._vectors())
        write_array(folder / "levels.npy", to_array(graph.levels))
        write_array(folder / "neighbors.npy", to_array(graph.neighbors))

    def _load(self, folder: Path, state: Mapping[str, Any], mmap: bool) -> None:
        """Rebuild the graph from arrays, each link checked: the library would follow a wrong one out of bounds."""
        faiss = library()
        self._index = self._empty()
        graph = self._index.hnsw
        self._ids_of_row = read_array(folder / "rows.npy", np.int64, (None,), mmap=False)
        total = len(self._ids_of_row)
        if not np.array_equal(self._ids_of_row[self._ids_of_row >= 0], self.ids_M):
            raise StorageError(f"{folder}: the graph's vectors are not those of ids.npy")
        levels = read_array(folder / "levels.npy", np.int32, (total,), mmap=False)
        neighbors = read_array(folder / "neighbors.npy", np.int32, (None,), mmap=False)
        vectors_MD = read_array(folder / "vectors.npy", np.float32, (total, self.width), mmap=True)
        highest = int(levels.max(initial=0))
        if levels.min(initial=1) < 1 or highest > graph.cum_nneighbor_per_level.size() - 1:
            raise StorageError(f"{folder}: layers of the graph are out of range")
        room = np.array([graph.cum_nb_neighbors(level) for level in range(highest + 1)], np.uint64)
        offsets = np.concatenate([np.zeros(1, np.uint64), np.cumsum(room[levels], dtype=np.uint64)])
        entry, top = int(state["entry_point"]), int(state["max_level"])
        entered = (entry, top) == (-1, -1) if not total else 0 <= entry < total and levels[entry] == highest == top + 1
        if len(neighbors) != offsets[-1] or neighbors.min(initial=0) < -1 or neighbors.max(initial=-1) >= total:
            raise StorageError(f"{folder}: links of the graph are out of range")
        self._check_layers(folder, levels, neighbors, offsets, room)
        if not entered:
            raise StorageError(f"{folder}: the graph has no such entry")
        if total:
            self._storage().add(np.array(vectors_MD))
        for array, vector in ((levels, graph.levels), (offsets, graph.offsets), (neighbors, graph.neighbors)):
            faiss.copy_array_to_vector(array, vector)
        graph.entry_point, graph.max_level, self._index.ntotal = entry, top, total

    @staticmethod
    def _check_layers(folder: Path, levels: Any, neighbors: Any, offsets: Any, room: Any) -> None:
        """A link of layer l leads to a vector that is in layer l; else the library reads beyond that vector's links."""
        for layer in range(1, len(room) - 1):
            for row in np.flatnonzero(levels > layer):
                start = int(offsets[row])
                linked = neighbors[start + int(room[layer]) : start + int(room[layer + 1])]
                if (levels[linked[linked >= 0]] <= layer).any():
                    raise StorageError(f"{folder}: a link of the graph leads out of its layer")

    def _empty(self) -> Any:
        index = library().IndexHNSWFlat(self.width, self.options.links, metric_of(self.metric))
        index.hnsw.efConstruction = self.options.construction
        return index

    def _vectors(self) -> Floats:
        """All of the graph's vectors, the removed ones included."""
        total = len(self._ids_of_row)
        vectors_MD: Floats = self._storage().reconstruct_n(0, total) if total else np.empty((0, self.width), np.float32)
        return vectors_MD

    def _storage(self) -> Any:
        return library().downcast_index(self._index.storage)
