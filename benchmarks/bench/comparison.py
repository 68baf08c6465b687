"""Several runs as one Markdown table: mean and standard deviation over seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cl_adapters.benchmarks.bench.variants import Options, benchmark_variant, completed, strategy_variant
from cl_adapters.benchmarks.report.report import flat
from cl_adapters.benchmarks.report.svg import amount
from cl_adapters.benchmarks.results.results import Results
from cl_adapters.errors import DataError

# Differences in these options do not make another experiment: they are what is averaged over, or places.
NOT_PART_OF_THE_EXPERIMENT = ("seed", "out", "device")


@dataclass(frozen=True)
class Stat:
    """Mean and standard deviation over runs.

    Attributes:
        mean: None if one of the runs did not measure it.
        std: of the sample (divided by n - 1); None for one run.
    """

    mean: float | None
    std: float | None

    @classmethod
    def of(cls, values: Sequence[float | None]) -> Stat:
        """Summarise the values of all runs; nothing is averaged over the runs that happen to have one."""
        known = [value for value in values if value is not None]
        if not known or len(known) < len(values):
            return cls(None, None)
        return cls(float(np.mean(known)), float(np.std(known, ddof=1)) if len(known) > 1 else None)


@dataclass(frozen=True, kw_only=True)
class Row:
    """Runs of one experiment that differ in their seed only.

    Attributes:
        benchmark_variant: by what it differs from others of that name in the table, or "".
        variant: an adapter type that is not the strategy's default, and the options by which this row differs from
            others of the same strategy and benchmark; or "".
        seeds: ascending.
        num_tasks: finished tasks, the same in all runs.
        a_bar, a_last: percent; forgetting in percentage points.
        trainable_parameters: of the largest task.
        adapters: in the end.
        stored_bytes: of all tasks together.
        passes_per_image: of the backbone, in evaluation.
        learning_seconds: real time of training, statistics and alignment.
        cpu_seconds: CPU time of everything; unlike real time it can be compared between runs side by side.
    """

    benchmark: str
    benchmark_variant: str
    strategy: str
    variant: str
    seeds: tuple[int, ...]
    num_tasks: int
    a_bar: Stat
    a_last: Stat
    forgetting: Stat
    trainable_parameters: Stat
    adapters: Stat
    stored_bytes: Stat
    passes_per_image: Stat
    learning_seconds: Stat
    cpu_seconds: Stat


def summarise(runs: Sequence[Results]) -> list[Row]:
    """Group runs by benchmark, strategy and configuration, and average over their seeds; rows in the order of runs.

    Runs of one strategy on one benchmark that differ in more than their seed (an option, the adapter type, the
    backbone, the number of finished tasks) become rows of their own, named by what differs: a mean over them would
    mean nothing.

    Raises:
        DataError: the same experiment was run twice with the same seed, which would make the deviation too small.
    """
    benchmarks: dict[str, dict[Options, dict[str, dict[Options, list[Results]]]]] = {}
    for run in runs:
        options = _options(run)
        of_benchmark = tuple(pair for pair in options if pair[0].startswith("benchmark."))
        rest = tuple(pair for pair in options if pair not in of_benchmark)
        strategies = benchmarks.setdefault(run.benchmark, {}).setdefault(of_benchmark, {})
        strategies.setdefault(run.strategy, {}).setdefault(rest, []).append(run)
    return [
        _row(group, benchmark_variant(of_benchmark, list(kinds)), strategy_variant(strategy, options, list(variants)))
        for kinds in benchmarks.values()
        for of_benchmark, strategies in kinds.items()
        for strategy, variants in strategies.items()
        for options, group in variants.items()
    ]


def to_markdown(rows: Sequence[Row]) -> str:
    """Return the rows as a Markdown table."""
    lines = [list(_HEADINGS), ["---"] * _WORDS + ["---:"] * (len(_HEADINGS) - _WORDS), *map(_cells, rows)]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines) + "\n"


_HEADINGS = (
    "benchmark",
    "strategy",
    "seeds",
    "tasks",
    "A-bar, %",
    "A_last, %",
    "forgetting",
    "trainable",
    "adapters",
    "passes",
    "stored",
    "learning, s",
    "CPU, s",
)
_WORDS = 3


def _cells(row: Row) -> list[str]:
    return [
        _label(row.benchmark, row.benchmark_variant),
        _label(row.strategy, row.variant),
        _ranges(row.seeds),
        str(row.num_tasks),
        *(with_deviation(stat, 2) for stat in (row.a_bar, row.a_last, row.forgetting)),
        amount(row.trainable_parameters.mean),
        "–" if row.adapters.mean is None else f"{row.adapters.mean:.1f}".removesuffix(".0"),
        with_deviation(row.passes_per_image, 2),
        amount(row.stored_bytes.mean, "B"),
        with_deviation(row.learning_seconds, 1),
        with_deviation(row.cpu_seconds, 1),
    ]


def _label(name: str, variant: str) -> str:
    return f"{name} ({variant})" if variant else name


def _row(group: Sequence[Results], benchmark_variant: str, variant: str) -> Row:
    first = group[0]
    seeds = [run.seed for run in group]
    twice = sorted({seed for seed in seeds if seeds.count(seed) > 1})
    if twice:
        raise DataError(
            f"{first.strategy} on {first.benchmark}: seed {twice[0]} is there {seeds.count(twice[0])} times with the "
            "same options; leave one of these runs out"
        )
    return Row(
        benchmark=first.benchmark,
        benchmark_variant=benchmark_variant,
        strategy=first.strategy,
        variant=variant,
        seeds=tuple(sorted(seeds)),
        num_tasks=first.num_tasks,
        a_bar=Stat.of([run.a_bar for run in group]),
        a_last=Stat.of([run.a_last for run in group]),
        forgetting=Stat.of([run.forgetting for run in group]),
        trainable_parameters=Stat.of([max(run.trainable_parameters) for run in group]),
        adapters=Stat.of([run.adapters[-1] if run.adapters else None for run in group]),
        stored_bytes=Stat.of([sum(run.stored_bytes_per_task) for run in group]),
        passes_per_image=Stat.of([run.backbone_passes_per_image.overall for run in group]),
        learning_seconds=Stat.of([run.seconds.total - run.seconds.eval for run in group]),
        cpu_seconds=Stat.of([run.cpu_seconds.total for run in group]),
    )


def _options(run: Results) -> Options:
    # The fingerprint says which backbone it was; where its weights lay does not matter.
    kept = {
        name: value
        for name, value in flat(completed(run.config))
        if name not in NOT_PART_OF_THE_EXPERIMENT and not name.startswith("backbone.")
    }
    fixed = {"backbone": f"{run.backbone.name} {run.backbone.fingerprint[:8]}", "finished tasks": str(run.num_tasks)}
    return tuple(sorted((kept | fixed).items()))


def with_deviation(stat: Stat, digits: int) -> str:
    """Return "mean ± deviation", the mean alone for one run, or a dash where it was not measured."""
    if stat.mean is None or math.isnan(stat.mean):
        return "–"
    return f"{stat.mean:.{digits}f}" + ("" if stat.std is None else f" ± {stat.std:.{digits}f}")


def _ranges(numbers: Sequence[int]) -> str:
    """Return (0, 1, 2, 5) as "0–2, 5"."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][1] + 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}–{b}" for a, b in parts)
