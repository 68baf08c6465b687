"""AdapterIndex: which adapters of a pool know this input?

Keys stand for the classes of each adapter, in the feature space of the bare backbone. The index is derived from the
pool's knowledge: it holds nothing that :meth:`AdapterIndex.rebuild` would not find there again.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from cl_adapters.backbones.inputs import as_inputs
from cl_adapters.config import counted
from cl_adapters.errors import DataError, StorageError, UnknownName
from cl_adapters.index.answers import Changes, Hit, IndexConfig, IndexStats, Neighbours, some
from cl_adapters.index.backends.base import Ids, IndexBackend
from cl_adapters.index.classes import nearest_classes
from cl_adapters.index.contents import Contents, wanted
from cl_adapters.index.files import default_folder, open_index, save_index
from cl_adapters.index.keys import KeyRecord, KeyRule, KeySource, writing_into
from cl_adapters.index.locks import ReadersWriter
from cl_adapters.index.space import Similarity, Space
from cl_adapters.parts.keys import Kind

Stale = Literal["error", "warn", "refresh", "ignore"]


class AdapterIndex:
    """Nearest classes and adapters for images or features. Make one with :meth:`build` or :meth:`open`.

    Queries may come from several threads; ``add``, ``remove``, ``refresh`` and ``rebuild`` wait for them and then run
    alone.

    Attributes:
        pool: where the keys come from.
        config: what was asked for.
        threads: CPU threads of a search; None: as many as torch uses.
    """

    def __init__(self, pool: KeySource, config: IndexConfig, contents: Contents) -> None:
        self.pool = pool
        self.config = config
        self._threshold: float | None = None
        self._calibrated_on: dict[str, str] | None = None  # digests by record
        self._warned = False
        self.threads: int | None = None
        self._contents = contents
        self._lock = ReadersWriter()
        self._names: tuple[Sequence[KeyRecord], dict[tuple[str, int], str | None]] = ((), {})

    @property
    def threshold(self) -> float | None:
        """Score below which the best hit means "none of these".

        None: not calibrated, which :func:`cl_adapters.index.calibration.calibrate` does. It is saved, and does not
        change what is found. Who reads it when it was calibrated on other keys is warned, once.
        """
        if self.threshold_stale and not self._warned:
            self._warned = True
            warnings.warn(
                "the threshold of this index was calibrated on other keys, so that it may refuse too much or too "
                "little: calibrate it again",
                stacklevel=2,
            )
        return self._threshold

    @threshold.setter
    def threshold(self, value: float | None) -> None:
        self._threshold, self._calibrated_on, self._warned = value, dict(self._contents.table.digests), False

    @property
    def threshold_stale(self) -> bool:
        """Whether the records or their keys have changed since the threshold was set; it is saved too."""
        return self._threshold is not None and self._calibrated_on != self._contents.table.digests

    @classmethod
    def build(
        cls,
        pool: KeySource,
        *,
        keys: Kind = "prototypes",
        per_class: int | None = None,
        metric: Similarity = "cosine",
        backend: str = "auto",
        options: Mapping[str, Any] | None = None,
        tags: Iterable[str] = (),
        seed: int = 0,
    ) -> AdapterIndex:
        """Make the index of a pool.

        Args:
            pool: its knowledge gives the keys. Records without features are left out, with a warning.
            keys: what stands for a class: "prototypes", "centroids" or "features".
            per_class: keys of a class at most; default 1, 4 and all.
            metric: "cosine", "ip", "l2" or "mahalanobis" (covariance within classes, shared by all).
            backend: registered name; "auto" chooses by the number of keys.
            options: of that back-end, such as {"probes": 8}.
            tags: only records that have all of these.
            seed: of every draw: k-means, samples, training of the back-end.

        Raises:
            ConfigError: an unknown name or option.
            DataError: features that cannot be used; no covariance for "mahalanobis".
        """
        rule = KeyRule(kind=keys, per_class=per_class, seed=seed)
        chosen = IndexConfig(rule=rule, metric=metric, backend=backend, options=dict(options or {}), tags=tuple(tags))
        return cls(pool, chosen, Contents.of_records(pool, wanted(pool, chosen), chosen))

    # --- asking --------------------------------------------------------------------------------------------------

    def query(
        self,
        x: Any,
        k: int = 5,
        *,
        classes: bool = False,
        tags: Iterable[str] = (),
        records: Iterable[str] | None = None,
    ) -> list[list[Hit]]:
        """What is nearest to every input, best first.

        Args:
            x: features float [B, D] under the bare backbone; or what the backbone takes (images float32 [B, C, H, W],
                tokens int64 [B, N], a mapping of tensors); or a list of texts.
            k: at least 1; more than there are keys is as many as there are.
            classes: the k nearest classes of adapters, each by its best key, instead of the k nearest keys.
            tags: only records that have all of these in the pool now.
            records: only these.

        Returns:
            B lists of up to k hits.

        Raises:
            DataError: features of another width, or not finite.
            ConfigError: k is no whole number, or below 1.
            UnknownName: a record that the index does not have.
        """
        f_BD, k = _bare_features(self.pool, x), min(counted(k, "k"), max(1, len(self)))
        return self.hits(self.search_features(f_BD, k, classes=classes, tags=tags, records=records))

    def search_features(
        self,
        f_BD: Any,
        k: int = 5,
        *,
        classes: bool = False,
        tags: Iterable[str] = (),
        records: Iterable[str] | None = None,
    ) -> Neighbours:
        """As :meth:`query`, for features float32 [B, D] (tensor or array), with arrays for an answer.

        They have k places per feature however few keys there are, so a large k asks for the memory of as many.
        """
        k = counted(k, "k")
        features = f_BD.detach().float().cpu().numpy() if isinstance(f_BD, Tensor) else np.asarray(f_BD)
        with self._lock.reading():
            allowed = self._allowed(set(tags), records)

            def search(wanted: int) -> Neighbours:
                return self._contents.search(features, wanted, allowed, self.threads)

            return nearest_classes(search, k, len(self._contents)) if classes else search(k)

    def hits(self, neighbours: Neighbours) -> list[list[Hit]]:
        """The same answers with names, without the places where fewer than k were found."""
        records = self.pool.records
        seen, names = self._names  # read once: another thread may replace it
        if records is not seen:  # the pool has changed
            names = {(record.id, known.label): known.name for record in records for known in record.classes}
            self._names = (records, names)
        return neighbours.named(names)

    # --- changing ------------------------------------------------------------------------------------------------

    def add(self, records: Iterable[str]) -> None:
        """Add records of the pool. The space stays as it is, the whitening too; ``rebuild`` fits it anew.

        Raises:
            UnknownName: a record that the pool does not have.
            DataError: a record that the index has already, or features of another width.
        """
        wanted = tuple(dict.fromkeys(records))
        known = {record.id: record for record in self.pool.records}
        with self._lock.writing():
            present = self._contents.table.digests
            for id in wanted:
                if id not in known:
                    raise UnknownName.of("adapter", id, known)
                if id in present:
                    raise DataError(f"the index has {id!r} already; remove it first, or call refresh()")
            new = [known[id] for id in wanted]
            if not self._contents.append(self.pool, new):
                kept = [record for record in known.values() if record.id in present]
                self._contents = Contents.of_records(self.pool, [*kept, *new], self.config)

    def remove(self, records: Iterable[str]) -> None:
        """Take records out; they need not be in the pool any more.

        Raises:
            UnknownName: a record that the index does not have.
        """
        with self._lock.writing():
            self._contents.drop(self._contents.table.known(records))

    def changes(self) -> Changes:
        """How the pool differs from the index now; nothing means that the index is up to date."""
        return self._contents.changes(self.pool)

    def refresh(self) -> Changes:
        """Bring the index up to date with the pool by removing and adding; returns what was different."""
        changes = self.changes()
        self.remove([*changes.removed, *changes.altered])
        self.add([*changes.added, *changes.altered])
        return changes

    def rebuild(self, pool: KeySource | None = None) -> None:
        """Make everything anew from the pool, or from another one."""
        pool = self.pool if pool is None else pool
        contents = Contents.of_records(pool, wanted(pool, self.config), self.config)
        with self._lock.writing():
            before, after = self._contents.space, contents.space
            if before and after and not np.array_equal(before.whitening_DD, after.whitening_DD):  # type: ignore[arg-type]
                self._calibrated_on = None  # the same keys, but other distances
            self.pool, self._contents = pool, contents

    def __len__(self) -> int:
        return len(self._contents)

    @property
    def records(self) -> tuple[str, ...]:
        """Ids of the records of this index."""
        return tuple(self._contents.table.digests)

    @property
    def space(self) -> Space | None:
        """How features are compared; None while there is no key."""
        return self._contents.space

    @property
    def backend(self) -> IndexBackend | None:
        """The back-end; None while there is no key."""
        return self._contents.backend

    def stats(self) -> IndexStats:
        """Figures: sizes, choices, and whether pool or threshold are those of then."""
        with self._lock.reading():
            return self._contents.stats(self.changes(), self._threshold, self.threshold_stale)

    # --- files ---------------------------------------------------------------------------------------------------

    def save(self, folder: str | Path | None = None, *, overwrite: bool = True) -> Path:
        """Write the index atomically, and return its folder.

        In the pool's folder this is done as the pool's only writer, so that nothing comes back that was forgotten.

        Args:
            folder: default index/default in the pool's folder.
            overwrite: replace an index that is there.

        Raises:
            StorageError: the place cannot be written, or holds something that is no index; or the index has records
                that its pool does not have any more, or has with other keys.
            PoolError: another writer of the pool took longer than its timeout.
        """
        folder = default_folder(self.pool) if folder is None else Path(folder)
        with writing_into(folder, self.pool), self._lock.reading():
            outdated = self._contents.outdated(self.pool)
            if outdated:
                raise StorageError(
                    f"{folder} was not written: since this index was made, the pool has lost {some(outdated)}, or has "
                    "other keys of it; call refresh() first, or build the index again"
                )
            save_index(self._contents, folder, overwrite, self._threshold, self.threshold_stale)
        return folder

    @classmethod
    def open(
        cls,
        folder: str | Path | None,
        pool: KeySource,
        *,
        mmap: bool = True,
        verify: bool = False,
        stale: Stale = "error",
    ) -> AdapterIndex:
        """Open a saved index.

        Args:
            folder: default index/default in the pool's folder.
            pool: the pool that it was built from.
            mmap: leave vectors on disk where the back-end can, and read what a query touches.
            verify: compare also files of more than 64 MiB with their SHA-256, which reads all of them. They hold raw
                numbers; damage there gives wrong answers, never worse.
            stale: if the pool has changed: "error", "warn", "refresh" (add and remove what differs), or "ignore".

        Raises:
            StorageError: missing or damaged files, or a pool that has changed.
        """
        if stale not in get_args(Stale):
            raise UnknownName.of("choice for a stale index", stale, get_args(Stale))
        folder = default_folder(pool) if folder is None else Path(folder)
        contents, threshold, threshold_stale = open_index(folder, mmap=mmap, verify=verify)
        index = cls(pool, contents.config, contents)
        index.threshold = threshold
        if threshold_stale:
            index._calibrated_on = None  # nobody knows any more on which
        changes = index.changes()
        found = f"{folder} does not fit its pool any more: {changes}"
        if changes and stale == "error":
            raise StorageError(
                f"{found}; open it with stale='refresh' (--stale refresh), or build it again (cl-adapters index build)"
            )
        if changes and stale == "warn":
            warnings.warn(f"{found}; refresh() it", stacklevel=2)
        if changes and stale == "refresh":
            index.refresh()
        return index

    def _allowed(self, tags: set[str], records: Iterable[str] | None) -> Ids | None:
        if not tags and records is None:
            return None
        ids = self._contents.table.known(self.records if records is None else records)
        if tags:
            ids &= {record.id for record in self.pool.records if tags <= set(record.tags)}
        return self._contents.table.keys_of(ids)


def _bare_features(pool: KeySource, x: Any) -> Any:
    """Float [B, D] under the bare backbone of a pool; what is float [B, D] already is given back.

    Raises:
        DataError: texts for a backbone that takes none.
    """
    if isinstance(x, str) or (isinstance(x, (list, tuple)) and x and all(isinstance(one, str) for one in x)):
        encode = getattr(pool.backbone.preprocessing, "encode", None)
        if encode is None:
            raise DataError(f"backbone {pool.backbone.name!r} takes no texts; give images or features")
        x = encode([x] if isinstance(x, str) else list(x))
    elif not isinstance(x, Mapping) and np.ndim(x) == 2 and not _whole_numbers(x):
        return x
    with torch.no_grad():
        return pool.backbone.features(as_inputs(x))


def _whole_numbers(x: Any) -> bool:
    """Whether these are token ids."""
    return (isinstance(x, Tensor) and not x.is_floating_point()) or (isinstance(x, np.ndarray) and x.dtype.kind in "iu")
