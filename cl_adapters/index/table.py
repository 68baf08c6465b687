"""Whose key is it: for every key of an index the record and the label."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from cl_adapters.errors import StorageError, UnknownName
from cl_adapters.index.backends.base import Ids


class KeyTable:
    """Keys are numbered as they come and never renumbered; those of a removed record belong to -1.

    Attributes:
        records: ids of the records in the order in which they came; None where one was removed.
        digests: record id to what it looked like when its keys were made.
        record_of_key: int64 [M'], position in ``records`` or -1.
        label_of_key: int64 [M'].
    """

    def __init__(self) -> None:
        self.records: tuple[str | None, ...] = ()
        self.digests: dict[str, str] = {}
        self.record_of_key: Ids = np.empty(0, np.int64)
        self.label_of_key: Ids = np.empty(0, np.int64)

    def extend(self, rows: Iterable[tuple[str, str, Ids]]) -> Ids:
        """Enter records with their digests and their keys' labels; returns the keys' numbers, one after the other."""
        owners, labels, first, records = [], [], len(self.record_of_key), list(self.records)
        for id, digest, labels_M in rows:
            owners.append(np.full(len(labels_M), len(records), np.int64))
            labels.append(labels_M)
            records.append(id)
            self.digests[id] = digest
        self.records = tuple(records)
        self.record_of_key = np.concatenate([self.record_of_key, *owners])
        self.label_of_key = np.concatenate([self.label_of_key, *labels])
        return np.arange(first, len(self.record_of_key))

    def known(self, ids: Iterable[str]) -> set[str]:
        """The ids as a set.

        Raises:
            UnknownName: one that is not here.
        """
        wanted = set(ids)
        for id in wanted - self.digests.keys():
            raise UnknownName.of("adapter of the index", id, self.digests)
        return wanted

    def drop(self, ids: Iterable[str]) -> Ids:
        """Take records out; returns the numbers of their keys."""
        gone = self.known(ids)
        keys = self.keys_of(gone)
        self.records = tuple(None if id in gone else id for id in self.records)
        for id in gone:
            del self.digests[id]
        self.record_of_key[keys] = -1
        return keys

    def keys_of(self, ids: Iterable[str]) -> Ids:
        """Numbers of the keys of these records, int64, rising; ids that are not here have none."""
        wanted = set(ids)
        member = np.array([id in wanted for id in self.records] + [False])  # the last is for -1
        return np.flatnonzero(member[self.record_of_key])

    def to_plain(self) -> dict[str, Any]:
        """What is not an array, as JSON-ready values."""
        return {"records": list(self.records), "digests": dict(self.digests)}

    @classmethod
    def of(cls, plain: Mapping[str, Any], record_of_key: Ids, label_of_key: Ids) -> KeyTable:
        """The table that was saved.

        Raises:
            StorageError: its parts contradict each other.
        """
        table = cls()
        table.records, table.digests = tuple(plain["records"]), dict(plain["digests"])
        table.record_of_key, table.label_of_key = record_of_key, label_of_key
        named = [id for id in table.records if id is not None]
        texts = all(isinstance(text, str) for text in (*named, *table.digests, *table.digests.values()))
        in_range = not len(record_of_key) or -1 <= record_of_key.min() <= record_of_key.max() < len(table.records)
        if not texts or not in_range or len(named) != len(set(named)) or set(named) != set(table.digests):
            raise StorageError("the table of keys contradicts itself; rebuild the index from the pool")
        return table
