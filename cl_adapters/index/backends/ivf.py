"""Inverted lists by faiss: vectors in lists around k-means centroids, of which a search scans the nearest few."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cl_adapters._seeding import derive
from cl_adapters.errors import StorageError
from cl_adapters.index.arrays import read_array, write_array, write_numbers
from cl_adapters.index.backends._faiss import id_bitmap, library, metric_of, settings, to_scores
from cl_adapters.index.backends.base import Floats, Ids, IndexBackend, indexes
from cl_adapters.index.backends.exact import nearest

POINTS = 40
"""Training vectors per centroid; faiss itself asks for 39 at least."""

ROUNDS = 8
"""Iterations of k-means."""

JUDGES = 512
"""Stored vectors that are asked for their nearest neighbour to choose the number of lists to scan."""

GROWTH = 4
"""Times the trained size at which centroids are trained anew."""


@dataclass(frozen=True, kw_only=True)
class IVFOptions:
    """Options of the inverted lists.

    Attributes:
        lists: number of lists; default a power of two near 2 sqrt(M), with at least 40 vectors per list.
        probes: lists scanned per query; default the fewest (a power of two) with which stored vectors find their
            nearest neighbour as often as ``recall`` says, tried when the index is built.
        recall: that share.
    """

    lists: int | None = None
    probes: int | None = None
    recall: float = 0.995

    def __post_init__(self) -> None:
        counts = [count for count in (self.lists, self.probes) if count is not None]
        if min(counts, default=1) < 1 or not 0 < self.recall <= 1:
            raise ValueError(f"lists and probes must be at least 1 and recall in (0, 1], got {self}")


@indexes.register("ivf")
class IVF(IndexBackend):
    """faiss IndexIVFFlat. Opened memory-mapped, only the lists that a search scans are read from disk."""

    summary = "faiss, inverted lists; quick to ask and to build, 4 bytes per number"
    Options = IVFOptions
    options: IVFOptions

    def _build(self, vectors_MD: Floats, ids_M: Ids) -> None:
        self._trained_on = len(vectors_MD)
        lists = self.options.lists or _lists_for(len(vectors_MD))
        lists = max(1, min(lists, len(vectors_MD)))
        self._index = self._empty(lists)
        self._train(self._sample(vectors_MD, lists * POINTS))
        self._fill(vectors_MD, ids_M)
        self._probes = self.options.probes or self._enough_probes(vectors_MD, ids_M)

    def _add(self, vectors_MD: Floats, ids_M: Ids) -> None:
        if len(self) + len(ids_M) <= max(GROWTH * self._trained_on, POINTS):
            self._own()
            self._fill(vectors_MD, ids_M)
            return
        old_ids, old_vectors = self._stored()
        self._build(np.concatenate([old_vectors, vectors_MD]), np.concatenate([old_ids, ids_M]))

    def _remove(self, ids: Ids) -> None:
        self._own()
        self._index.remove_ids(library().IDSelectorBatch(ids))

    def _search(self, queries_BD: Floats, k: int, allowed: Ids | None) -> tuple[Floats, Ids]:
        lists = self._index.nlist
        selector = None if allowed is None else id_bitmap(allowed, int(self.ids_M.max()) + 1)
        # Where few vectors are allowed, the wanted ones are spread over more lists.
        share = 1.0 if allowed is None else len(allowed) / len(self)
        probes = min(lists, math.ceil(self._probes / share))
        scores_BK, ids_BK = self._probe(queries_BD, k, probes, selector)
        short = (ids_BK < 0).any(1)
        if short.any():
            scores_BK[short], ids_BK[short] = self._probe(queries_BD[short], k, lists, selector)
        return scores_BK, ids_BK

    def _probe(self, queries_BD: Floats, k: int, probes: int, selector: Any) -> tuple[Floats, Ids]:
        """Search so many lists; ids of -1 where they hold fewer than k vectors."""
        parameters = library().SearchParametersIVF(nprobe=probes, sel=selector)
        with settings(self._threads(), len(queries_BD)):
            values_BK, ids_BK = self._index.search(queries_BD, k, params=parameters)
        return to_scores(values_BK, self.metric), ids_BK

    @property
    def nbytes(self) -> int:
        """Codes, ids (in the lists and in the order of their coming) and centroids."""
        lists = self._index.nlist * 4 * self.width
        return int(len(self) * (self._index.code_size + 8) + self.ids_M.nbytes + lists)

    # --- training ------------------------------------------------------------------------------------------------

    def _empty(self, lists: int) -> Any:
        faiss, metric = library(), metric_of(self.metric)
        self._coarse = faiss.IndexFlat(self.width, metric)
        return faiss.IndexIVFFlat(self._coarse, self.width, lists, metric)

    def _train(self, sample_SD: Floats) -> None:
        for clustering in self._clusterings():
            clustering.seed = derive(self.seed, "k-means") % 2**31
            clustering.niter = ROUNDS
            clustering.min_points_per_centroid = 1  # silences warnings: small indexes have few vectors per list
            clustering.max_points_per_centroid = 1 << 30  # the sample is drawn here, by our own seed
        with settings(self._threads(), len(sample_SD)):
            self._index.train(sample_SD)

    def _clusterings(self) -> list[Any]:
        return [self._index.cp]

    def _sample(self, vectors_MD: Floats, size: int) -> Floats:
        """Up to ``size`` vectors to train on, none twice; one of zeros where there is none yet."""
        if not len(vectors_MD):
            return np.zeros((1, self.width), np.float32)
        if len(vectors_MD) <= size:
            return vectors_MD
        draw = np.random.default_rng(derive(self.seed, "index", "training"))
        return vectors_MD[np.sort(draw.choice(len(vectors_MD), size, replace=False))]

    def _fill(self, vectors_MD: Floats, ids_M: Ids) -> None:
        if len(ids_M):
            with settings(self._threads(), len(vectors_MD)):
                self._index.add_with_ids(vectors_MD, ids_M)

    def _enough_probes(self, vectors_MD: Floats, ids_M: Ids) -> int:
        """The fewest lists with which stored vectors find their nearest neighbour other than themselves."""
        lists = int(self._index.nlist)
        if lists == 1 or len(ids_M) < 3:
            return 1
        draw = np.random.default_rng(derive(self.seed, "index", "judges"))
        judges = np.sort(draw.choice(len(ids_M), min(JUDGES, len(ids_M)), replace=False))
        queries = vectors_MD[judges]
        wanted, _ = _others(*nearest(vectors_MD, queries, 2, self.metric), judges)
        probes = 1
        while probes < lists:
            got, found = _others(*self._probe(queries, 2, probes, None), ids_M[judges])
            # An equal score will do (duplicates); the margin is the rounding of float32.
            hits = (found >= 0) & (got >= wanted - 1e-5 * (1 + np.abs(wanted)))
            if hits.mean() >= self.options.recall:
                break
            probes *= 2
        return min(probes, lists)

    # --- files ---------------------------------------------------------------------------------------------------

    def _state(self) -> Mapping[str, Any]:
        return {"lists": self._index.nlist, "probes": self._probes, "trained_on": self._trained_on}

    def _save(self, folder: Path) -> None:
        lists = self._index.nlist
        write_array(folder / "centroids.npy", self._coarse.reconstruct_n(0, lists))
        sizes = np.array([self._index.invlists.list_size(i) for i in range(lists)], np.uint64)
        write_array(folder / "sizes.npy", sizes)
        with (folder / "lists.bin").open("wb") as file:
            for i in np.flatnonzero(sizes):
                codes, ids = self._list(int(i))
                write_numbers(file, codes)
                write_numbers(file, ids)

    def _load(self, folder: Path, state: Mapping[str, Any], mmap: bool) -> None:
        lists = int(state["lists"])
        self._probes, self._trained_on = max(1, min(int(state["probes"]), lists)), int(state["trained_on"])
        centroids = read_array(folder / "centroids.npy", np.float32, (lists, self.width), mmap=False)
        self._index = self._empty(lists)
        self._coarse.add(centroids)
        self._load_trained(folder, state)
        sizes = read_array(folder / "sizes.npy", np.uint64, (lists,), mmap=False)
        path, room = folder / "lists.bin", self._index.code_size + 8
        stored = sum(sizes.tolist())  # Python's integers do not overflow
        if stored != len(self) or path.stat().st_size != stored * room:
            raise StorageError(f"{path} is truncated or not of this index: {stored} vectors of {room} bytes expected")
        self._index.is_trained = True
        if stored:
            self._map(path, sizes)
            if not mmap:
                self._own()

    def _load_trained(self, folder: Path, state: Mapping[str, Any]) -> None:
        """Read what was trained besides the centroids."""

    def _map(self, path: Path, sizes: Any) -> None:
        faiss = library()
        mapped = faiss.OnDiskInvertedLists()
        mapped.nlist, mapped.code_size = self._index.nlist, self._index.code_size
        mapped.filename, mapped.read_only = str(path), True
        mapped.prefetch_nthread = 0  # it would start that many threads for every query
        mapped.lists.resize(mapped.nlist)
        mapped.set_all_lists_sizes(faiss.swig_ptr(sizes))
        mapped.totsize = path.stat().st_size
        mapped.do_mmap()
        self._use(mapped)

    def _own(self) -> None:
        """Move memory-mapped lists into memory, where they can be changed."""
        faiss = library()
        lists = faiss.downcast_InvertedLists(self._index.invlists)
        if isinstance(lists, faiss.OnDiskInvertedLists):
            memory = faiss.ArrayInvertedLists(self._index.nlist, self._index.code_size)
            lists.copy_subset_to(memory, 0, 0, (1 << 63) - 1)  # 0: ids in a range, here all
            self._use(memory)

    def _use(self, lists: Any) -> None:
        self._index.replace_invlists(lists, False)
        self._lists = lists  # faiss keeps a pointer only
        self._index.ntotal = len(self)

    def _list(self, i: int) -> tuple[Any, Ids]:
        """Codes uint8 [n, code] and ids int64 [n] of one list; views, for a list that is not empty."""
        faiss, lists = library(), self._index.invlists
        size, code = lists.list_size(i), self._index.code_size
        codes = faiss.rev_swig_ptr(lists.get_codes(i), size * code).reshape(size, code)
        return codes, faiss.rev_swig_ptr(lists.get_ids(i), size)

    def _stored(self) -> tuple[Ids, Floats]:
        """All vectors with their ids, copied."""
        filled = [i for i in range(self._index.nlist) if self._index.invlists.list_size(i)]
        lists = [self._list(i) for i in filled]
        ids = np.concatenate([ids for _, ids in lists] or [np.empty(0, np.int64)])
        vectors = [codes.view(np.float32) for codes, _ in lists] or [np.empty((0, self.width), np.float32)]
        return ids, np.concatenate(vectors)


def _lists_for(n: int) -> int:
    lists: int = 1 << round(math.log2(2 * math.sqrt(max(n, 1))))
    return max(1, min(lists, n // POINTS))


def _others(scores_B2: Floats, ids_B2: Ids, own_B: Ids) -> tuple[Floats, Ids]:
    """Of two hits per query, the better one that is not the query itself."""
    second = (ids_B2[:, 0] == own_B).astype(np.int64)[:, None]
    return np.take_along_axis(scores_B2, second, 1)[:, 0], np.take_along_axis(ids_B2, second, 1)[:, 0]
