"""``results.json``: what one run measured, in a documented and versioned schema (docs/results.md).

The figures that follow from the accuracy matrix are computed when results are made; ``read`` computes them again and
refuses a file in which they do not agree.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sized
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np

from cl_adapters import metrics
from cl_adapters._io import read_json, write_bytes
from cl_adapters.benchmarks.results.parts import (
    BackboneInfo,
    Expansion,
    Passes,
    Routing,
    Row,
    Rows,
    Seconds,
    agree,
    check_lengths,
    figures,
)
from cl_adapters.config import build, to_plain
from cl_adapters.errors import ConfigError, StorageError

__all__ = ["BackboneInfo", "Expansion", "Passes", "Results", "Routing", "Row", "Rows", "Seconds", "read", "write"]

SCHEMA_VERSION = 2
_NEW_IN_2 = ("adapters", "adapter_parameters", "adapters_per_block")
FILE_NAME = "results.json"


@dataclass(frozen=True, kw_only=True)
class Results:
    """Everything that a run measured; every field is described in docs/results.md.

    T is the number of tasks that were finished, C the number of classes of the benchmark. ``accuracy_matrix`` may
    be given as an array [T, T] with NaN for unmeasured cells. The last eight fields are computed, never given.

    Raises:
        ValueError: lists of different length, a label without a name, an accuracy outside 0..100 percent.
    """

    strategy: str
    benchmark: str
    backbone: BackboneInfo
    seed: int
    class_names: tuple[str, ...]
    class_order: tuple[int, ...]
    task_classes: tuple[tuple[int, ...], ...]
    test_counts: tuple[int, ...]
    accuracy_matrix: Rows
    backbone_passes_per_image: Passes
    trainable_parameters: tuple[int, ...]
    stored_bytes_per_task: tuple[int, ...]
    seconds_per_task: tuple[Seconds, ...]
    cpu_seconds_per_task: tuple[Seconds, ...]
    started: str
    finished: str
    config: dict[str, Any]
    versions: dict[str, str]
    hardware: dict[str, str | int | float | None]
    licence: str = ""
    routing: Routing | None = None
    adapters: tuple[int, ...] | None = None
    adapter_parameters: tuple[int, ...] | None = None
    adapters_per_block: tuple[dict[str, int], ...] | None = None
    expansions: tuple[Expansion, ...] | None = None
    schema_version: int = SCHEMA_VERSION
    a_curve: Row = field(init=False)
    a_bar: float | None = field(init=False)
    a_last: float | None = field(init=False)
    forgetting_per_task: Row = field(init=False)
    forgetting: float | None = field(init=False)
    backward_transfer: float | None = field(init=False)
    seconds: Seconds = field(init=False)
    cpu_seconds: Seconds = field(init=False)

    def __post_init__(self) -> None:
        self._check_lengths()
        derived = figures(self.accuracy_matrix, self.test_counts) | {
            "seconds": Seconds.sum(self.seconds_per_task),
            "cpu_seconds": Seconds.sum(self.cpu_seconds_per_task),
        }
        for name, value in derived.items():
            object.__setattr__(self, name, value)

    @property
    def matrix(self) -> metrics.Matrix:
        """The accuracy matrix as float64 [T, T] in percent, NaN where it was not measured."""
        return np.array(self.accuracy_matrix, dtype=np.float64)

    @property
    def num_tasks(self) -> int:
        """T, the number of finished tasks."""
        return len(self.task_classes)

    def _check_lengths(self) -> None:
        tasks, classes = len(self.task_classes), len(self.class_names)
        lists: dict[str, Sized] = {
            "test_counts": self.test_counts,
            "trainable_parameters": self.trainable_parameters,
            "stored_bytes_per_task": self.stored_bytes_per_task,
            "seconds_per_task": self.seconds_per_task,
            "cpu_seconds_per_task": self.cpu_seconds_per_task,
            "backbone_passes_per_image.per_evaluation": self.backbone_passes_per_image.per_evaluation,
        }
        lists |= {name: entries for name in _NEW_IN_2 if (entries := getattr(self, name)) is not None}
        if self.routing is not None:
            lists["routing.counts"] = self.routing.counts
        check_lengths(lists, {"accuracy_matrix": self.accuracy_matrix}, tasks)
        labels = {*self.class_order, *(label for task in self.task_classes for label in task)}
        if not labels <= set(range(classes)):
            raise ValueError(
                f"labels {sorted(labels - set(range(classes)))} have no name: there are {classes} class_names"
            )
        unknown = sorted({entry.task for entry in self.expansions or ()} - set(range(tasks)))
        if unknown:
            raise ValueError(f"expansions name the tasks {unknown}, but only 0..{tasks - 1} are finished")
        if self.schema_version != SCHEMA_VERSION:
            raise ValueError(f"schema_version is {self.schema_version!r}, this release writes {SCHEMA_VERSION}")


DERIVED = tuple(entry.name for entry in fields(Results) if not entry.init)


def write(results: Results, path: str | os.PathLike[str]) -> Path:
    """Write ``results.json`` so that the file is always either the old or the complete new one; returns its path.

    The results are validated as ``read`` would, so what was written can be read.

    Raises:
        ConfigError: a value that has no place in the schema: NaN, infinity, a wrong type.
        StorageError: the file cannot be written.
    """
    _refuse_non_finite(asdict(results), "")
    plain = to_plain(results) | {name: _derived(results, name) for name in DERIVED}
    build(Results, {name: value for name, value in plain.items() if name not in DERIVED})
    lines = [f"{json.dumps(name)}: {_dump(plain[name])}" for name in (field.name for field in fields(Results))]
    place = Path(path)
    write_bytes(place, ("{\n" + ",\n".join(lines) + "\n}\n").encode())
    return place


def read(path: str | os.PathLike[str]) -> Results:
    """Read ``results.json`` (or that of a run folder), of this schema or an older one.

    Raises:
        StorageError: no such file, no JSON, a newer or unknown schema, a missing or unknown key, a wrong type, or
            computed figures that do not agree with the accuracy matrix of the same file.
    """
    place = Path(path)
    place = place / FILE_NAME if place.is_dir() else place
    plain = _migrated(read_json(place, schema_version=SCHEMA_VERSION))
    missing = [field.name for field in fields(Results) if field.name not in plain]
    if missing:
        raise StorageError(f"{place} has no {', '.join(missing)}; it is not a complete results file")
    try:
        results = build(Results, {name: value for name, value in plain.items() if name not in DERIVED})
    except ConfigError as error:
        raise StorageError(f"{place} does not follow the schema of results: {error}") from error
    for name in DERIVED:
        computed = _derived(results, name)
        if not agree(plain[name], computed):
            raise StorageError(
                f"{place} was altered: {name} is {_short(plain[name])}, the rest gives {_short(computed)}"
            )
    return results


def _migrated(plain: dict[str, Any]) -> dict[str, Any]:
    """Schema 1 to 2: adapters were not counted, and ``expansions`` was there but always null."""
    if plain["schema_version"] != 1:
        return plain
    return dict.fromkeys(_NEW_IN_2) | plain | {"schema_version": 2}


def _derived(results: Results, name: str) -> Any:
    value = getattr(results, name)
    return asdict(value) if isinstance(value, Seconds) else list(value) if isinstance(value, tuple) else value


def _refuse_non_finite(value: Any, place: str) -> None:
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{place} is {value}, which JSON cannot hold; use None for what was not measured")
    if isinstance(value, dict):
        for key, entry in value.items():
            _refuse_non_finite(entry, f"{place}.{key}" if place else str(key))
    elif isinstance(value, list | tuple):
        for position, entry in enumerate(value):
            _refuse_non_finite(entry, f"{place}[{position}]")


def _dump(value: Any) -> str:
    """One line, or one line per row for tables, so that people can read and compare files."""
    if isinstance(value, list) and value and isinstance(value[0], list | dict):
        return "[\n " + ",\n ".join(json.dumps(row, allow_nan=False) for row in value) + "\n]"
    return json.dumps(value, allow_nan=False)


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "..."
