"""What an index holds: a space, a back-end with vectors, and the table of whose they are."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch

from cl_adapters import config
from cl_adapters.errors import DataError, StorageError
from cl_adapters.index.answers import Changes, IndexConfig, IndexStats, Neighbours
from cl_adapters.index.backends.base import Floats, Ids, IndexBackend, finite_rows, indexes
from cl_adapters.index.keys import KeyRecord, KeySource, digest, make_keys, space_of
from cl_adapters.index.space import Space
from cl_adapters.index.table import KeyTable

SCANNED = 4_000_000
"""Numbers that a full scan reads in under 1 ms on one thread: 10,000 keys of width 384 in 0.6 ms, 5,000 of 768."""


class Contents:
    """Space, back-end and table of one index; whoever changes it keeps others out.

    Attributes:
        config: what was asked for.
        table: whose key is it.
        space: how features are compared; None, like the back-end, while there is no key.
        backend: vectors by the table's numbers.
    """

    def __init__(
        self, config: IndexConfig, table: KeyTable, space: Space | None = None, backend: IndexBackend | None = None
    ) -> None:
        self.config, self.table, self.space, self.backend = config, table, space, backend

    @classmethod
    def of_records(cls, pool: KeySource, records: list[KeyRecord], config: IndexConfig) -> Contents:
        """Make everything from the knowledge of these records.

        Raises:
            DataError: features that cannot be used; no covariance for "mahalanobis".
        """
        contents = cls(config, KeyTable())
        keys_MD, rows = contents._keys(pool, records, None)
        ids = contents.table.extend(rows)
        if len(ids):
            contents.space = space_of(pool, records, config.metric, keys_MD)
            contents.backend = contents._new_backend(contents.space.project(keys_MD), ids)
        return contents

    def __len__(self) -> int:
        return 0 if self.backend is None else len(self.backend)

    def append(self, pool: KeySource, records: list[KeyRecord]) -> bool:
        """Add records; False, with nothing changed, where everything has to be made anew instead."""
        if self.space is None or self.backend is None:
            return not records
        keys_MD, rows = self._keys(pool, records, self.backend.width)
        name = indexes.name_of(self.backend)
        if self.config.backend == "auto" and choose(len(self) + len(keys_MD), self.backend.width) != name:
            return False
        first = len(self.table.record_of_key)
        self.backend.add(np.arange(first, first + len(keys_MD)), self.space.project(keys_MD))
        self.table.extend(rows)
        return True

    def drop(self, ids: Iterable[str]) -> None:
        """Remove records that are here."""
        keys = self.table.drop(tuple(ids))
        if self.backend is not None:
            self.backend.remove(keys)

    def search(self, f_BD: Any, k: int, allowed: Ids | None, threads: int | None) -> Neighbours:
        """The k nearest keys.

        Raises:
            DataError: features of another width, or not finite.
            StorageError: the back-end found a key that is not in the table.
        """
        if self.space is None or self.backend is None:
            features = finite_rows(f_BD, np.shape(f_BD)[-1] if np.ndim(f_BD) else 0, "features")
            scores_BK = np.full((len(features), k), -np.inf, np.float32)
            keys_BK = np.full((len(features), k), -1, np.int64)
        else:
            features = finite_rows(f_BD, self.backend.width, "features")
            self.backend.threads = threads
            scores_BK, keys_BK = self.backend.search(self.space.project(features), k, allowed)
        table, found = self.table, keys_BK >= 0
        if not np.isfinite(scores_BK[found]).all():
            raise DataError("scores are not finite: the features, or the numbers of this index, are too large")
        if keys_BK.max(initial=-1) >= len(table.record_of_key):
            raise StorageError("the files of this index are damaged; open it with verify=True, or rebuild it")
        records_BK = np.full(keys_BK.shape, -1, np.int64)
        labels_BK = np.full(keys_BK.shape, -1, np.int64)
        records_BK[found] = table.record_of_key[keys_BK[found]]
        labels_BK[found] = table.label_of_key[keys_BK[found]]
        scores, records, labels = (torch.from_numpy(array) for array in (scores_BK, records_BK, labels_BK))
        return Neighbours(scores, records, labels, table.records)

    def changes(self, pool: KeySource) -> Changes:
        """How the pool differs from what is here."""
        now = {record.id: digest(record) for record in wanted(pool, self.config)}
        then = dict(self.table.digests)
        return Changes(
            added=tuple(id for id in now if id not in then),
            removed=tuple(id for id in then if id not in now),
            altered=tuple(id for id in now if id in then and then[id] != now[id]),
        )

    def outdated(self, pool: KeySource) -> list[str]:
        """Ids of the records that a pool does not have any more, or of which it has other keys now."""
        now = {record.id: digest(record) for record in pool.records}
        return [id for id, then in self.table.digests.items() if now.get(id) != then]

    def stats(self, changes: Changes, threshold: float | None, threshold_stale: bool) -> IndexStats:
        """Figures."""
        table, backend, rule = self.table, self.backend, self.config.rule
        live = table.record_of_key >= 0
        with_keys = set(table.record_of_key[live].tolist())
        bare = [id for place, id in enumerate(table.records) if id is not None and place not in with_keys]
        pairs = np.stack([table.record_of_key[live], table.label_of_key[live]])
        nbytes = 0 if backend is None else backend.nbytes
        return IndexStats(
            keys=len(self),
            records=len(table.digests),
            classes=np.unique(pairs, axis=1).shape[1],
            width=None if backend is None else backend.width,
            metric=self.config.metric,
            rule=rule.kind if rule.limit in (None, 1) else f"{rule.kind}, up to {rule.limit} per class",
            backend=None if backend is None else indexes.name_of(backend),
            nbytes=nbytes,
            bytes_per_key=nbytes / len(self) if len(self) else None,
            without_keys=tuple(bare),
            changes=changes,
            threshold=threshold,
            threshold_stale=threshold_stale,
        )

    def _keys(
        self, pool: KeySource, records: list[KeyRecord], width: int | None
    ) -> tuple[Floats, list[tuple[str, str, Ids]]]:
        """Keys float32 [M, D] before projection, and rows for the table."""
        parts, rows, bare = [], [], []
        for record in records:
            keys_MD, labels_M = make_keys(
                record, pool.knowledge(record.id), self.config.rule, self.config.metric == "cosine"
            )
            rows.append((record.id, digest(record), labels_M))
            if not len(keys_MD):
                bare.append(record.id)
                continue
            width = keys_MD.shape[1] if width is None else width
            parts.append(finite_rows(keys_MD, width, f"keys of {record.id!r}:"))
        if bare:
            warnings.warn(
                f"{len(bare)} adapters have no features in the pool's knowledge, so the index cannot find them: "
                f"{', '.join(bare[:5])}{', ...' if len(bare) > 5 else ''}",
                stacklevel=4,
            )
        return np.concatenate(parts) if parts else np.empty((0, width or 0), np.float32), rows

    def _new_backend(self, vectors_MD: Floats, ids_M: Ids) -> IndexBackend:
        assert self.space is not None
        chosen = self.config.backend
        name = choose(*vectors_MD.shape) if chosen == "auto" else chosen
        cls = indexes.get(name)
        options = config.build(cls.Options, self.config.options, f"index {name}")
        try:
            return cls.build(vectors_MD, ids_M, metric=self.space.metric, options=options, seed=self.config.rule.seed)
        except ValueError as error:  # an option that does not fit this width
            raise error if isinstance(error, DataError) else DataError(f"index {name}: {error}") from error


def wanted(pool: KeySource, config: IndexConfig) -> list[KeyRecord]:
    """The records that an index of a pool is of."""
    return [record for record in pool.records if set(config.tags) <= set(record.tags)]


def choose(keys: int, width: int) -> str:
    """Name of the back-end that an index of so many keys (M) of that width (D) takes when none is named.

    A full scan while it answers one query in under a millisecond; then inverted lists, which are built ten times faster
    than a graph, can lose keys, and are opened from disk without reading them. Without faiss: "exact", with a warning
    where that is slow.
    """
    small = keys * width <= SCANNED
    if importlib.util.find_spec("faiss") is None:
        if not small:
            warnings.warn(
                f"faiss is not installed, so {keys} keys are scanned one by one; pip install faiss-cpu", stacklevel=3
            )
        return "exact"
    return "flat" if small else "ivf"
