"""The threshold of an index: a score below which the answer is "none of these"."""

from __future__ import annotations

import torch
from torch import Tensor

from cl_adapters.errors import DataError
from cl_adapters.index.index import AdapterIndex
from cl_adapters.index.keys import KeyRecord
from cl_adapters.openset import threshold_for


def calibrate(index: AdapterIndex, false_reject: float | None = None, *, false_accept: float | None = None) -> float:
    """Set ``index.threshold`` from the features that were held back in training, and return it.

    See :func:`cl_adapters.openset.threshold_for`; each adapter's held-back features act as unknown inputs to the
    adapters that share no class with it (:func:`unknown_scores`). The threshold is for searches of the whole index; a
    filter by tags or records leaves fewer keys, so that more is refused.

    Args:
        index: its pool has "held_out" features in the knowledge of its records.
        false_reject: target rate in (0, 1); give this one, or
        false_accept: this one.

    Raises:
        ConfigError: not exactly one target, or one outside (0, 1).
        DataError: too few held-back features for it; no two adapters without a common class.
    """

    def known() -> Tensor:
        held = [_held_out(index, record) for record in _records(index)]
        held = [f_HD for f_HD in held if len(f_HD)]
        return index.search_features(torch.cat(held), 1).scores[:, 0] if held else torch.empty(0)

    index.threshold, _ = threshold_for(false_reject, false_accept, known, lambda: unknown_scores(index))
    return index.threshold


def unknown_scores(index: AdapterIndex) -> Tensor:
    """For each held-back feature the best score among the adapters that share no class with its own, float32 [H].

    Features of adapters that share a class with every other one are left out.

    Raises:
        DataError: there are no two adapters with keys and without a common class.
    """
    records, scores = _records(index), [torch.empty(0)]
    apart = False
    for record in records:
        others = [other.id for other in records if not set(other.labels) & set(record.labels)]
        held_HD = _held_out(index, record)
        if others and len(held_HD):
            found_H = index.search_features(held_HD, 1, records=others).scores[:, 0]
            scores.append(found_H[found_H > -torch.inf])
        apart = apart or bool(others)
    if not apart:
        raise DataError("false_accept needs two adapters without a common class: each is unknown to the other")
    return torch.cat(scores)


def _records(index: AdapterIndex) -> list[KeyRecord]:
    """Those of the index that know classes and are in the pool still."""
    present = set(index.records)
    return [record for record in index.pool.records if record.id in present and record.classes]


def _held_out(index: AdapterIndex, record: KeyRecord) -> Tensor:
    """float32 [H, D]; none: [0, 0]."""
    return index.pool.knowledge(record.id).get("held_out", torch.empty(0, 0))
