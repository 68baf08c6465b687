"""What is written after each task (``row.json``), and how the rows of all tasks become :class:`Results`."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cl_adapters.benchmarks.base import BenchmarkData
from cl_adapters.benchmarks.results.results import BackboneInfo, Expansion, Passes, Results, Routing, Seconds
from cl_adapters.benchmarks.run.experiment import Experiment
from cl_adapters.config import check_range
from cl_adapters.model.facade import AdapterModel
from cl_adapters.strategies.base import AdapterStrategy

Plain = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class TaskRow:
    """What ``row.json`` holds, for checking what was read; rows of earlier releases lack the fields with defaults.

    Raises:
        ValueError: lists that do not belong to tasks 0..task, an accuracy outside 0..100, a negative count.
    """

    task: int
    accuracy: tuple[float, ...]
    routing: tuple[tuple[int, ...], ...]
    passes: float
    computed: float = 0.0
    trainable_parameters: int
    stored_bytes: int
    seconds: Seconds
    cpu_seconds: Seconds
    started: str
    finished: str
    adapters: int = 0
    adapter_parameters: int = 0
    adapters_per_block: dict[str, int] = dataclasses.field(default_factory=dict)
    task_of_slot: tuple[int, ...] = ()
    expansions: tuple[Expansion, ...] = ()

    def __post_init__(self) -> None:
        check_percent(self.accuracy, self.task + 1, "accuracy")
        check_range(self, "[0, inf)", "passes", "computed", "trainable_parameters", "adapters", "adapter_parameters")
        widths = {len(line) for line in self.routing}
        if len(self.routing) != self.task + 1 or len(widths) != 1 or min(map(min, self.routing), default=-1) < 0:
            raise ValueError(f"routing needs {self.task + 1} lines of equally many counts")
        if self.task_of_slot and {len(self.task_of_slot) + 1} != widths:
            raise ValueError("task_of_slot needs one task for each adapter of routing")
        if any(entry.task != self.task for entry in self.expansions):
            raise ValueError(f"expansions must be of task {self.task}")
        for name in ("seconds", "cpu_seconds"):
            if min(dataclasses.astuple(getattr(self, name))) < 0:
                raise ValueError(f"{name} must not be negative")


def check_percent(values: Sequence[float | None], length: int, name: str) -> None:
    """Check percentages, one per task so far; None: not measured.

    Raises:
        ValueError: another number of them, or one outside 0..100.
    """
    if len(values) != length:
        raise ValueError(f"{name} needs {length} numbers, one per task so far, got {len(values)}")
    if not all(value is None or 0 <= value <= 100 for value in values):
        raise ValueError(f"{name} must be percentages from 0 to 100, got {list(values)}")


def growth(strategy: AdapterStrategy) -> Plain:
    """The adapters after a task, and those that the task asked for: the JSON-ready part of its row."""
    model: AdapterModel = strategy.model
    bank = model.bank
    at: Counter[int] = Counter()
    if bank is not None:
        at.update(dict.fromkeys(bank.blocks, 0))
        block_of = {site.name: site.block for site in bank.sites}
        for slot in range(bank.num_slots):
            # one adapter has many tensors, and may have several sites in a block
            at.update({block_of[key.rpartition("/")[0]] for key, _ in bank.named_slot(slot)})
    return {
        "adapters": model.num_slots,
        "adapter_parameters": 0 if bank is None else sum(parameter.numel() for parameter in bank.parameters()),
        "adapters_per_block": {str(block): at[block] for block in sorted(at)},
        "task_of_slot": list(model.task_of_slot),
        "expansions": [
            dataclasses.asdict(entry) | {"score": entry.score if math.isfinite(entry.score) else None}
            for entry in strategy.expansions
        ],
    }


def to_results(
    rows: Sequence[Plain], experiment: Experiment, data: BenchmarkData, backbone: BackboneInfo, run: Mapping[str, Any]
) -> Results:
    """Put the rows of the finished tasks, at least one, together; ``run`` is the content of ``config.json``."""
    tasks = data.tasks[: len(rows)]
    pad = [None] * len(rows)
    labels = data.test.labels
    strategy = experiment.strategy_class
    found = tuple(Expansion(**entry) for row in rows for entry in row.get("expansions", ()))
    return Results(
        strategy=experiment.strategy,
        benchmark=experiment.benchmark,
        backbone=backbone,
        seed=experiment.seed,
        class_names=data.classes,
        class_order=data.class_order,
        task_classes=tasks,
        test_counts=tuple(int(sum((labels == label).sum() for label in task)) for task in tasks),
        accuracy_matrix=tuple(tuple([*row["accuracy"], *pad][: len(rows)]) for row in rows),
        backbone_passes_per_image=Passes(
            per_evaluation=tuple(row["passes"] for row in rows), overall=_weighted_passes(rows)
        ),
        trainable_parameters=tuple(row["trainable_parameters"] for row in rows),
        stored_bytes_per_task=tuple(row["stored_bytes"] for row in rows),
        seconds_per_task=tuple(Seconds(**row["seconds"]) for row in rows),
        cpu_seconds_per_task=tuple(Seconds(**row["cpu_seconds"]) for row in rows),
        started=rows[0]["started"],
        finished=rows[-1]["finished"],
        config=run["experiment"],
        versions=run["versions"],
        hardware=run.get("hardware", {}),
        licence=data.licence,
        routing=_routing(rows) if strategy.retrieves else None,
        expansions=found if found or strategy.expands else None,
        **{name: _of_all(rows, name) for name in ("adapters", "adapter_parameters", "adapters_per_block")},
    )


def _routing(rows: Sequence[Plain]) -> Routing | None:
    """Which adapter answered, against the task for which it was made; None while there is no choice."""
    slots = len(rows[-1]["routing"][0]) - 1
    # rows written before adapters were dated come from strategies that made one per task
    tasks = tuple(rows[-1].get("task_of_slot") or range(slots))
    if slots < 2:
        return None
    return Routing(
        adapters=tuple(map(str, range(slots))),
        adapter_tasks=tasks,
        counts=tuple(tuple(line[1:]) for line in rows[-1]["routing"]),
        right_share=tuple(_right_share(row["routing"], tasks) for row in rows),
    )


def _right_share(counts: Sequence[Sequence[int]], tasks: Sequence[int]) -> float:
    """Percent of images answered by an adapter of their own task; the first column is the bare backbone."""
    right = sum(
        images
        for task, line in enumerate(counts)
        for made_in, images in zip(tasks, line[1:], strict=False)  # later slots were not there yet
        if made_in == task
    )
    return 100 * right / _total(counts)


def _of_all(rows: Sequence[Plain], name: str) -> Any:
    """One value per task; None if a row is from before it was recorded."""
    return tuple(row[name] for row in rows) if all(name in row for row in rows) else None


def _total(counts: Sequence[Sequence[int]]) -> int:
    return max(1, sum(map(sum, counts)))


def _weighted_passes(rows: Sequence[Plain]) -> float:
    images = [_total(row["routing"]) for row in rows]
    return float(sum(row["passes"] * n for row, n in zip(rows, images, strict=True)) / sum(images))
