"""An index of a pool in the place of a model's keys: inputs are looked up there, and no key is held by the model.

B batch, C classes, D width of the features, K keys that are found, T owners (adapters).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from cl_adapters._forms import shown
from cl_adapters.errors import ClAdaptersError, PoolError
from cl_adapters.index.answers import Neighbours
from cl_adapters.index.classes import MOST, widening
from cl_adapters.index.files import default_folder
from cl_adapters.index.index import AdapterIndex
from cl_adapters.parts.keys import KeyLookup, best_of_owners
from cl_adapters.pool.pool import AdapterPool
from cl_adapters.pool.record import Record

LOOKED_AT = 1024
"""Nearest keys that are looked at for the scores of classes."""


class IndexedKeys(nn.Module, KeyLookup):
    """Looks inputs up in an index of the pool that the model was made of.

    Scores are those of the index's metric. Only the model's records are searched, also where the index has more of
    them, or gets more later; leaving records out costs the index a pass over its table of keys for every batch. A class
    counts as without a key where none of its keys is among the nearest 1024 (``class_scores``). A model
    with this in the place of keys cannot be saved: the keys are in the pool.

    Args:
        index: see :func:`index_for`.
        records: of the model, in the order of its columns.
        means_CD: mean of each class's keys in the pool.
    """

    means_CD: Tensor

    def __init__(self, index: AdapterIndex, records: Sequence[Record], means_CD: Tensor) -> None:
        super().__init__()
        self.index = index
        self.records = tuple(records)
        self.register_buffer("means_CD", means_CD)
        # one row per class, by label: the label, the class's column, the record that has its keys
        owners = [(label, record.id) for record in self.records for label in record.labels]
        rows = sorted((label, column, id) for column, (label, id) in enumerate(owners))
        labels, columns, self._record_C = zip(*rows, strict=True)
        self._label_C, self._column_C = torch.tensor(labels), torch.tensor(columns)
        self._ids = frozenset(record.id for record in self.records)
        self._seen: tuple[tuple[str | None, ...], Tensor] | None = None

    @property
    def metric(self) -> str:
        """The index's."""
        return self.index.config.metric

    def nearest(self, f_BD: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Scores and class columns of the k nearest keys that the index finds.

        Raises:
            ClAdaptersError: it finds none, or keys of classes that the model does not have.
        """
        present = self.index.records
        own = None if self._ids.issuperset(present) else tuple(id for id in present if id in self._ids)
        found = self.index.search_features(f_BD, min(k, max(1, len(self.index))), records=own)
        column_BK = self._columns(found)
        if bool((column_BK[:, 0] < 0).any()):
            raise ClAdaptersError(
                "the index has no key of this model's classes any more: refresh() it, or make the model again"
            )
        scores_BK = found.scores.masked_fill(column_BK < 0, -torch.inf)
        return scores_BK.to(f_BD.device), column_BK.clamp_min(0).to(f_BD.device)

    def class_scores(self, f_BD: Tensor, classes: int | None = None) -> Tensor:
        """Score of the nearest key of each class among the 1024 nearest keys."""
        scores_BK, column_BK = self.nearest(f_BD, LOOKED_AT)
        return best_of_owners(scores_BK, column_BK, classes or len(self.means_CD))

    def owner_scores(self, f_BD: Tensor, owner_C: Tensor, owners: int, k: int) -> Tensor:
        """Score of the nearest key of each owner among the nearest keys: so many that k owners are among them.

        At most 16,384 keys are looked at; owners beyond those count as without a key.
        """
        wanted = min(k, len(owner_C.unique()))
        near_BT = f_BD.new_full((len(f_BD), owners), -torch.inf, dtype=torch.float32)
        rows = torch.arange(len(f_BD), device=f_BD.device)
        for looked_at in widening(4 * k, min(MOST, len(self.index))):
            scores_BK, column_BK = self.nearest(f_BD[rows], looked_at)
            best_BT = best_of_owners(scores_BK, owner_C[column_BK], owners)
            near_BT[rows] = best_BT
            rows = rows[best_BT.isfinite().sum(1) < wanted]
            if not len(rows):
                break
        return near_BT

    def means(self) -> Tensor:
        """Mean of each class's keys in the pool, float32 [C, D]."""
        return self.means_CD

    def __deepcopy__(self, memo: dict[int, object]) -> IndexedKeys:
        return IndexedKeys(self.index, self.records, self.means_CD.clone())  # the index is shared

    def _columns(self, found: Neighbours) -> Tensor:
        """Class columns of what was found, int64 [B, K]; -1 where fewer were, or where it is not the model's."""
        seen = self._seen  # read once: another thread may replace it
        if seen is None or seen[0] is not found.ids:
            place_of = {id: place for place, id in enumerate(found.ids) if id is not None}
            self._seen = seen = found.ids, torch.tensor([place_of.get(id, -2) for id in self._record_C])
        place_C = seen[1]
        at_BK = torch.searchsorted(self._label_C, found.labels).clamp_max(len(self._label_C) - 1)
        own_BK = (self._label_C[at_BK] == found.labels) & (place_C[at_BK] == found.records)
        return self._column_C[at_BK].where(own_BK, -1)


def index_for(pool: AdapterPool, index: AdapterIndex | str | Path, records: Sequence[Record]) -> AdapterIndex:
    """The index that a model of these records can look inputs up in.

    Args:
        pool: of the records.
        index: open already; or the folder of a saved one; or, as text without a slash, its name in the pool's folder.
        records: of the model.

    Raises:
        StorageError: no index there, or a damaged one.
        PoolError: an index of another pool, or one that lacks records or has old keys of them.
    """
    if not isinstance(index, AdapterIndex):
        named = isinstance(index, str) and Path(index).name == index
        index = AdapterIndex.open(default_folder(pool, str(index)) if named else index, pool, stale="ignore")
    elif Path(index.pool.path).resolve() != pool.path.resolve():
        raise PoolError(f"this index is of the pool at {index.pool.path}, the model of that at {pool.path}")
    present, altered = set(index.records), set(index.changes().altered)
    for record in records:
        if record.id not in present or record.id in altered:
            what = "has old keys of" if record.id in altered else "does not have"
            raise PoolError(
                f"the index {what} adapter {shown(record.id)}: refresh() it or build it again (cl-adapters index "
                "build), or choose other records by ids="
            )
    return index
