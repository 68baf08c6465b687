"""The parts of ``results.json``: small records, described one by one in docs/results.md."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence, Sized
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from cl_adapters import metrics

Row = tuple[float | None, ...]
Rows = tuple[Row, ...]

AGREE_WITHIN = 1e-6
"""Percentage points, between stored and recomputed figures."""


def figures(accuracy_matrix: Rows, counts: Sequence[int]) -> dict[str, Any]:
    """What follows from an accuracy matrix, by name, ready for JSON (:mod:`cl_adapters.metrics`).

    The matrix is [T, T] in percent, None or NaN where nothing was measured; ``counts`` are [T] test samples.
    """
    matrix = np.array(accuracy_matrix, dtype=np.float64)
    curve = metrics.average_curve(matrix, counts)
    return {
        "accuracy_matrix": tuple(_row(line) for line in matrix),
        "a_curve": _row(curve),
        "a_bar": _number(metrics.average_accuracy(curve)),
        "a_last": _number(metrics.last_accuracy(curve)),
        "forgetting_per_task": _row(metrics.forgetting_per_task(matrix)),
        "forgetting": _number(metrics.forgetting(matrix)),
        "backward_transfer": _number(metrics.backward_transfer(matrix)),
    }


def check_lengths(lists: Mapping[str, Sized], matrices: Mapping[str, Rows], tasks: int) -> None:
    """Check that there is one entry, and in a matrix one row and one column, for each finished task.

    Raises:
        ValueError: names what has another number.
    """
    for name, entries in {**lists, **matrices}.items():
        if len(entries) != tasks:
            raise ValueError(f"{name} has {len(entries)} entries, expected one for each of {tasks} finished tasks")
    for name, rows in matrices.items():
        if any(len(row) != tasks for row in rows):
            raise ValueError(f"each row of {name} needs {tasks} cells, with null for unseen tasks")


def agree(stored: Any, computed: Any) -> bool:
    """Whether a stored figure, or a table of such, is what the rest of its file gives."""
    if isinstance(computed, dict):
        return (
            isinstance(stored, dict)
            and stored.keys() == computed.keys()
            and all(agree(stored[key], computed[key]) for key in computed)
        )
    if isinstance(computed, list):
        return isinstance(stored, list) and len(stored) == len(computed) and all(map(agree, stored, computed))
    if computed is None or stored is None or isinstance(stored, bool) or not isinstance(stored, int | float):
        return stored is None and computed is None
    return math.isclose(stored, computed, rel_tol=1e-9, abs_tol=AGREE_WITHIN)


def _number(value: float) -> float | None:
    return None if math.isnan(value) else float(value)


def _row(values: metrics.Vector) -> Row:
    return tuple(_number(float(value)) for value in values)


@dataclass(frozen=True, kw_only=True)
class BackboneInfo:
    """The frozen backbone: ``name`` as given on the command line, ``fingerprint`` of weights and preprocessing."""

    name: str
    fingerprint: str


@dataclass(frozen=True, kw_only=True)
class Passes:
    """Backbone passes per test image: ``per_evaluation`` [T] means (None: not evaluated), ``overall`` mean."""

    per_evaluation: Row
    overall: float | None


@dataclass(frozen=True, kw_only=True)
class Seconds:
    """Seconds by what they were spent on: training, statistics of features, classifier alignment, evaluation."""

    train: float = 0.0
    statistics: float = 0.0
    alignment: float = 0.0
    eval: float = 0.0

    @property
    def total(self) -> float:
        """Sum of the four parts."""
        return self.train + self.statistics + self.alignment + self.eval

    @classmethod
    def sum(cls, rows: Sequence[Seconds]) -> Seconds:
        """Add up the rows of all tasks, part by part."""
        return cls(**{part.name: math.fsum(getattr(row, part.name) for row in rows) for part in fields(cls)})


@dataclass(frozen=True, kw_only=True)
class Routing:
    """Which adapter answered in the last evaluation, against the task that the image belongs to.

    Attributes:
        adapters: ids of the adapters, one per column.
        adapter_tasks: for each column the task (from 0) for which that adapter was trained.
        counts: [T, adapters] test images; row = right task.
        right_share: [T] percent of images answered by an adapter of their own task, per evaluation.
    """

    adapters: tuple[str, ...]
    adapter_tasks: tuple[int, ...]
    counts: tuple[tuple[int, ...], ...]
    right_share: Row = ()

    def __post_init__(self) -> None:
        if len(self.adapter_tasks) != len(self.adapters) or any(len(row) != len(self.adapters) for row in self.counts):
            raise ValueError(
                f"routing needs one task and one column of counts for each of {len(self.adapters)} adapters"
            )


@dataclass(frozen=True, kw_only=True)
class Expansion:
    """An adapter that the data asked for: :class:`cl_adapters.strategies.base.Expansion`; a score is finite or None."""

    task: int
    block: int
    slot: int
    score: float | None
    threshold: float
    scan: int
    batch: int
