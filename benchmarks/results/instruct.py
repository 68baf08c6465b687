"""``instruct.json``: what a run of continual instruction tuning measured, in two accuracy matrices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from cl_adapters._io import read_json, write_json
from cl_adapters.benchmarks.results.parts import BackboneInfo, Row, Rows, agree, check_lengths, figures
from cl_adapters.config import build, to_plain
from cl_adapters.errors import ConfigError, StorageError

SCHEMA_VERSION = 1
FILE_NAME = "instruct.json"


@dataclass(frozen=True, kw_only=True)
class Judged:
    """One way of judging: the accuracy matrix, and the figures that follow from it (:mod:`cl_adapters.metrics`).

    Attributes:
        accuracy_matrix: [T, T], percent of exact matches on task j (column) after task t (row); None: not measured.
        test_counts: [T], test examples per task.
        a_curve, a_bar, a_last, forgetting_per_task, forgetting, backward_transfer: computed, never given; None where a
            cell is missing.
    """

    accuracy_matrix: Rows
    test_counts: tuple[int, ...]
    a_curve: Row = field(init=False)
    a_bar: float | None = field(init=False)
    a_last: float | None = field(init=False)
    forgetting_per_task: Row = field(init=False)
    forgetting: float | None = field(init=False)
    backward_transfer: float | None = field(init=False)

    def __post_init__(self) -> None:
        derived = figures(self.accuracy_matrix, self.test_counts)
        for name, value in derived.items():
            object.__setattr__(self, name, value)


@dataclass(frozen=True, kw_only=True)
class InstructResults:
    """Everything that a run measured; T is the number of finished tasks.

    Attributes:
        data: as the user named it.
        backbone: the frozen model's encoder.
        tasks: [T] names, in order.
        train_counts: [T] training examples.
        likelihood: by the likeliest label string; None where no task has such.
        generation: by the generated answer.
        train_loss: [T], mean loss on the answers' tokens in the last epoch.
        trainable_parameters: [T], at once.
        stored_bytes_per_task: [T], what the saved model grew by.
        seconds_train, seconds_eval: [T], wall clock.
    """

    method: str
    data: str
    backbone: BackboneInfo
    seed: int
    tasks: tuple[str, ...]
    train_counts: tuple[int, ...]
    likelihood: Judged | None
    generation: Judged
    train_loss: tuple[float, ...]
    trainable_parameters: tuple[int, ...]
    stored_bytes_per_task: tuple[int, ...]
    seconds_train: tuple[float, ...]
    seconds_eval: tuple[float, ...]
    config: dict[str, Any]
    versions: dict[str, str]
    schema_version: int = SCHEMA_VERSION

    def __post_init__(self) -> None:
        ways = {name: way for name in WAYS if (way := getattr(self, name)) is not None}
        lists = {name: getattr(self, name) for name in PER_TASK}
        lists |= {f"{name}.test_counts": way.test_counts for name, way in ways.items()}
        check_lengths(
            lists, {f"{name}.accuracy_matrix": way.accuracy_matrix for name, way in ways.items()}, len(self.tasks)
        )


WAYS = ("likelihood", "generation")
PER_TASK = (
    "train_counts",
    "train_loss",
    "trainable_parameters",
    "stored_bytes_per_task",
    "seconds_train",
    "seconds_eval",
)
DERIVED = tuple(entry.name for entry in fields(Judged) if not entry.init)


def write(results: InstructResults, path: Path) -> Path:
    """Write the file: a reader sees the old one or the new one, whole.

    Raises:
        StorageError: the place cannot be written.
    """
    plain = to_plain(results)
    for way in WAYS:
        judged = getattr(results, way)
        plain[way] = None if judged is None else {name: _listed(value) for name, value in asdict(judged).items()}
    write_json(path, plain)
    return path


def read(path: Path) -> InstructResults:
    """Read ``instruct.json``, or that of a run folder; the computed figures are computed again.

    Raises:
        StorageError: no such file, of a newer release, not of this schema, or altered.
    """
    path = path / FILE_NAME if path.is_dir() else path
    plain = read_json(path, schema_version=SCHEMA_VERSION)
    given = dict(plain)
    for way in WAYS:
        if isinstance(plain.get(way), dict):
            given[way] = {name: value for name, value in plain[way].items() if name not in DERIVED}
    try:
        results = build(InstructResults, given)
    except ConfigError as error:
        raise StorageError(f"{path} does not follow the schema of instruction results: {error}") from error
    for way in WAYS:
        judged = getattr(results, way)
        for name in DERIVED if judged is not None else ():
            if not agree(plain[way].get(name), _listed(getattr(judged, name))):
                raise StorageError(f"{path} was altered: {way}.{name} does not follow from its accuracy matrix")
    return results


def judged(rows: Sequence[Sequence[float | None]], counts: Sequence[int]) -> Judged | None:
    """The rows of the finished tasks as a matrix; None where nothing was measured."""
    if all(cell is None for row in rows for cell in row):
        return None
    matrix = tuple((*row, *[None] * (len(rows) - len(row))) for row in rows)
    return Judged(accuracy_matrix=matrix, test_counts=tuple(counts))


def _listed(value: Any) -> Any:
    return [_listed(entry) for entry in value] if isinstance(value, tuple) else value
