"""Forgetting an adapter or a class on request: what belongs to it is gone, the rest stays as it was, bit for bit."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cl_adapters.errors import ClAdaptersError, StorageError, UnknownName
from cl_adapters.index.files import index_folders, unfinished_folders
from cl_adapters.index.index import AdapterIndex
from cl_adapters.index.keys import KeySource
from cl_adapters.pool.checks import PER_CLASS, PER_KEY
from cl_adapters.pool.model_card import anchor_of, read_card
from cl_adapters.pool.pool import AdapterPool
from cl_adapters.pool.record import Record

if TYPE_CHECKING:
    from torch import Tensor

    from cl_adapters.backbones.frozen import FrozenBackbone


@dataclass(frozen=True)
class Forgotten:
    """What :func:`forget` did.

    Attributes:
        removed: what is gone, a line each.
        cannot_undo: where traces of it remain in other numbers, a line each; empty: nowhere in the pool.
    """

    removed: tuple[str, ...]
    cannot_undo: tuple[str, ...]


def forget(pool: AdapterPool, target: str | int) -> Forgotten:
    """Remove an adapter, or one class, from a pool.

    Tensors, keys, prototypes, rows of the linear head and held-back features go, their files are deleted, and every
    index in the pool's folder is made anew, since its structure was shaped by the keys that go. What no other record
    names is not kept anywhere in the pool. Exports, copies and runs elsewhere are not reached. Nobody else writes to
    the pool meanwhile; an index that was opened or begun before refuses to be saved with what is gone.

    Args:
        pool: changed in place.
        target: id of a record, or the label of a class. Where a class is the last of its record, the record goes.

    Raises:
        UnknownName: no such adapter or class.
        StorageError: an index can be neither made anew nor deleted.
        PoolError: another writer took longer than the pool's timeout.
    """
    with pool.locked():
        return _forget(pool, target)


def _forget(pool: AdapterPool, target: str | int) -> Forgotten:
    owners = [pool.get(target)] if isinstance(target, str) else list(pool.list(classes=[target]))
    if not owners:
        known = {str(label) for record in pool.records for label in record.labels}
        raise UnknownName.of("class label", str(target), known)
    removed, traces = [], []
    # Indexes first: killed on the way, they hold nothing of it, and it is still there to be forgotten again.
    for place in unfinished_folders(pool.path):
        _delete(place)
        removed.append(f"folder {place.name!r} of an index, left by a writer that was killed")
    indexes = [(place, _made_anew(place, _Without(pool, owners), pool)) for place in index_folders(pool.path)]
    for owner in owners:
        whole = isinstance(target, str) or owner.labels == (target,)
        traces += list(_traces(pool, owner, None if whole else int(target)))
        if whole:
            pool.remove(owner.id)
            classes = ", ".join(map(_named, owner.labels))
            removed.append(f"adapter {owner.id!r} ({owner.num_parameters:,} parameters) with {classes or 'no class'}")
        else:
            _without(pool, owner, int(target))
            removed.append(
                f"{_named(int(target))} of adapter {owner.id!r}: keys, prototype, head row, held-back features"
            )
    if not pool.broken:  # what a broken record owns cannot be told from orphans
        removed += [f"file {name}, left by a writer that was killed" for name in pool.gc()]
    what = f"adapter {target!r}" if isinstance(target, str) else _named(target)
    for place, done in indexes:
        index = _made_anew(place, pool, pool) if done and any(owner.id in pool for owner in owners) else done
        if index is None:
            removed.append(f"index {place.name!r}, which could not be made anew: build it again")
            continue
        removed.append(f"entries of index {place.name!r}, which was made anew")
        if index.threshold_stale:
            traces.append(
                f"the threshold of index {place.name!r} was calibrated when {what} was known; calibrate it again"
            )
    return Forgotten(tuple(removed), tuple(dict.fromkeys(traces)))


def _without(pool: AdapterPool, record: Record, label: int) -> None:
    """Take one class out of a record; the other rows keep their bytes."""
    gone = record.labels.index(label)
    kept = [place for place in range(len(record.classes)) if place != gone]
    knowledge = pool.knowledge(record.id)
    for key in PER_CLASS:
        if key in knowledge:
            knowledge[key] = knowledge[key][kept]
    for places, rows in PER_KEY.items():
        if places in knowledge:
            place_M = knowledge[places]
            for key in knowledge.keys() & set(rows):
                knowledge[key] = knowledge[key][place_M != gone]
            place_M = place_M[place_M != gone]
            knowledge[places] = place_M - (place_M > gone).long()
    smaller = dataclasses.replace(record, classes=tuple(record.classes[place] for place in kept))
    pool.replace(smaller, knowledge=knowledge or None)


def _traces(pool: AdapterPool, owner: Record, label: int | None) -> Iterator[str]:
    """What of an adapter, or of one of its classes, lives on in other numbers."""
    what = f"adapter {owner.id!r}" if label is None else _named(label)
    if label is not None:
        yield f"adapter {owner.id!r} was trained on images of {what} together with its other classes; remove it whole"
    heirs = [record for record in pool.records if record.id in _descendants(pool, owner.id)]
    for heir in heirs:
        how = "" if heir.merge is None else f" ({', '.join(f'{key} {value}' for key, value in heir.merge.items())})"
        yield f"adapter {heir.id!r} started from or was merged with {owner.id!r}{how}, and keeps a share of it"
    for other in pool.records if label is None else ():
        shared = [_named(one) for one in owner.labels if one in other.labels]
        if shared and other.id != owner.id:
            yield f"adapter {other.id!r} knows {', '.join(shared)} too, by keys and rows of its own: forget the class"
    if any(record.merge is not None and record.merge.get("head") == "aligned" for record in [owner, *heirs]):
        yield f"the linear head's rows of all other classes were aligned together with samples of {what}"
    card = read_card(pool.path)
    if label is None and owner == anchor_of(card, pool.records):
        yield (
            f"the other classes' prototypes were taken under {owner.id!r}; without it this pool's predictor "
            f"{card['predictor']['type']!r} cannot run: pass another to AdapterModel.from_pool"
        )
    if card.get("abstention"):
        yield f"the threshold of abstention was calibrated when {what} was known; calibrate it again"


def _descendants(pool: AdapterPool, id: str) -> set[str]:
    """Ids of all records that have this one among their parents, or parents' parents."""
    found, before = {id}, 0
    while len(found) > before:
        before = len(found)
        found |= {record.id for record in pool.records if found & set(record.parents)}
    return found - {id}


class _Without:
    """A pool as an index sees it, with some of its records left out."""

    def __init__(self, pool: AdapterPool, gone: Sequence[Record]) -> None:
        ids = {record.id for record in gone}
        self._pool, self.path = pool, pool.path
        self.records = tuple(record for record in pool.records if record.id not in ids)

    @property
    def backbone(self) -> FrozenBackbone:
        """The pool's."""
        return self._pool.backbone

    def knowledge(self, id: str) -> dict[str, Tensor]:
        """The pool's."""
        return self._pool.knowledge(id)

    def locked(self) -> AbstractContextManager[None]:
        """The pool's."""
        return self._pool.locked()


def _made_anew(place: Path, source: KeySource, pool: AdapterPool) -> AdapterIndex | None:
    """Make an index anew from these records; None: it cannot be, and is deleted.

    Raises:
        StorageError: it cannot even be deleted.
    """
    try:
        index = AdapterIndex.open(place, pool, mmap=False, stale="ignore")
        index.rebuild(source)
        index.save(place)
    except ClAdaptersError:
        _delete(place)
        return None
    return index


def _delete(place: Path) -> None:
    try:
        shutil.rmtree(place)
    except OSError as error:
        raise StorageError(f"{place} can be neither made anew nor deleted: {error.strerror or error}") from error


def _named(label: int) -> str:
    return f"class {label}"
