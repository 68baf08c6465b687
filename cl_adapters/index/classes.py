"""One hit per class: where a class has many keys, the nearest keys may all be of one, so the search widens."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch

from cl_adapters.index.answers import Neighbours
from cl_adapters.index.backends.base import Ids

WIDER = 4
"""How many times as many keys the next search asks for."""
MOST = 16_384
"""Keys that are looked at per query; classes that are farther away are not found."""


def widening(first: int, most: int) -> Iterator[int]:
    """How many keys to ask for, one search after the other, until enough are found; the last is at least ``most``."""
    yield first
    while first < most:
        first *= WIDER
        yield first


def nearest_classes(search: Callable[[int], Neighbours], k: int, keys: int) -> Neighbours:
    """The k nearest classes of adapters, each by its best key.

    Args:
        search: gives the n nearest keys of every query.
        k: classes per query.
        keys: keys that there are.

    Returns:
        As of ``search``, with k places per query; empty ones where the nearest ``MOST`` keys are of fewer classes.
    """
    most = max(k, min(keys, MOST))
    for wanted in widening(k, most):
        found = search(min(wanted, most))
        rows = [_firsts(row) for row in _pairs(found)]
        full = [len(row) >= k for row in rows]
        exhausted = (found.records < 0).any(1).tolist()  # there are no more keys to find
        if all(a or b for a, b in zip(full, exhausted, strict=True)):
            break
    return _kept(found, rows, k)


def _pairs(found: Neighbours) -> Ids:
    """One number per adapter and class, int64 [B, n]; -1 at empty places."""
    records, labels = found.records.numpy(), found.labels.numpy()
    known = np.unique(labels, return_inverse=True)
    numbers: Ids = records * len(known[0]) + known[1].reshape(labels.shape)
    return np.where(records < 0, -1, numbers)


def _firsts(pairs_N: Ids) -> Ids:
    """Places of the first hit of each class, ascending."""
    numbers, places = np.unique(pairs_N, return_index=True)
    return np.sort(places[numbers >= 0])


def _kept(found: Neighbours, rows: list[Ids], k: int) -> Neighbours:
    scores = found.scores.new_full((len(rows), k), -torch.inf)
    records, labels = (found.records.new_full((len(rows), k), -1) for _ in range(2))
    for row, places in enumerate(rows):
        chosen = torch.from_numpy(places[:k])
        for target, source in ((scores, found.scores), (records, found.records), (labels, found.labels)):
            target[row, : len(chosen)] = source[row, chosen]
    return Neighbours(scores, records, labels, found.ids)
