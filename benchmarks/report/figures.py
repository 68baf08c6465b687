"""The figures of the report: each a chart with a title, a caption and, where colours mean something, a legend."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from markupsafe import Markup

from cl_adapters.benchmarks.report import charts
from cl_adapters.benchmarks.report.charts import Series
from cl_adapters.benchmarks.report.svg import amount, duration, percent
from cl_adapters.benchmarks.results.results import Results, Seconds

# A heat map of more cells than this a side is drawn in blocks of tasks: finer ones are smaller than a pixel.
MAX_CELLS = 100

TIME_PARTS = (("train", "training"), ("statistics", "statistics"), ("alignment", "alignment"), ("eval", "evaluation"))


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A chart for the page.

    Attributes:
        title: heading.
        caption: what to see in it, one or two sentences.
        picture: the SVG; None shows the caption only.
        legend: (class of the style sheet, text) of each series.
        columns: headings of a small table under the chart, if any.
        rows: its lines.
    """

    title: str
    caption: str
    picture: Markup | None = None
    legend: tuple[tuple[str, str], ...] = ()
    columns: tuple[str, ...] = ()
    rows: tuple[tuple[str, ...], ...] = ()


def accuracy_matrix(results: Results) -> Figure:
    """Heat map of the accuracy matrix."""
    caption = "Accuracy on the test images of each task (columns) after training each task (rows), in percent."
    blocks = task_blocks(results.num_tasks)
    if len(blocks) < results.num_tasks:
        caption += f" Each cell is the mean over a block of up to {len(blocks[0])} by {len(blocks[0])} tasks."
    names = [span(block) for block in blocks]
    shares = _block_means(results.matrix, blocks)
    tips = [
        [
            f"after task {row}, on task {column}: {percent(known(share))}"
            for column, share in zip(names, line, strict=True)
        ]
        for row, line in zip(names, shares, strict=True)
    ]
    picture = charts.heat_map(
        shares,
        rows=[str(block[0] + 1) for block in blocks],
        columns=[str(block[0] + 1) for block in blocks],
        row_title="after training task",
        column_title="accuracy on task",
        tips=tips,
        label="Accuracy matrix",
        description=f"{caption} Last row: {listed(results.accuracy_matrix[-1])}.",
    )
    return Figure(title="Accuracy matrix", caption=caption, picture=picture)


def accuracy_curve(results: Results) -> Figure:
    """A_t over the tasks, with the accuracy on the task just learnt."""
    newest = [results.accuracy_matrix[task][task] for task in range(results.num_tasks)]
    curve = Series(
        values=results.a_curve,
        tips=[f"after task {t + 1}: {percent(v)} on all classes so far" for t, v in enumerate(results.a_curve)],
    )
    fresh = Series(
        values=newest,
        tips=[f"task {t + 1} just after training it: {percent(v)}" for t, v in enumerate(newest)],
        style="s2",
    )
    legend = [("s1", "all classes so far, A_t"), ("s2", "the task just learnt")]
    if results.a_bar is not None:
        legend.append(("reference", f"mean of A_t: {percent(results.a_bar)}"))
    picture = charts.lines(
        [curve, fresh],
        axis_title="accuracy, %",
        label="Accuracy after each task",
        description=f"A_t: {listed(results.a_curve)}.",
        reference=results.a_bar,
    )
    caption = "Accuracy on the test images of all classes seen so far; every image weighs the same."
    return Figure(title="Accuracy after each task", caption=caption, picture=picture, legend=tuple(legend))


def forgetting(results: Results) -> Figure:
    """Forgetting per task."""
    title = "Forgetting per task"
    if results.num_tasks == 1:
        return Figure(title=title, caption="Nothing to forget: forgetting is defined from two tasks on.")
    caption = "Best earlier accuracy minus the final one, in percentage points; below zero a task got better."
    values = results.forgetting_per_task
    tips = [f"task {t + 1}: " + ("not measured" if v is None else f"{v:+.1f} points") for t, v in enumerate(values)]
    picture = charts.bars(
        [Series(values=values, tips=tips, style="s2")],
        axis_title="points",
        label=title,
        description=f"{caption} {listed(values)}.",
        number=lambda value: f"{value:.1f}".removesuffix(".0"),
        reference=results.forgetting,
    )
    mean = (("reference", f"mean: {results.forgetting:.1f} points"),) if results.forgetting is not None else ()
    return Figure(title=title, caption=caption, picture=picture, legend=mean)


def passes(results: Results) -> Figure:
    """Backbone passes per image."""
    values = results.backbone_passes_per_image.per_evaluation
    tips = [
        f"after task {t + 1}: " + ("not evaluated" if v is None else f"{v:.2f} passes per image")
        for t, v in enumerate(values)
    ]
    caption = "Forward passes of the backbone that one test image took, on average, in each evaluation."
    picture = charts.bars(
        [Series(values=values, tips=tips, style="s3")],
        axis_title="passes",
        label="Backbone passes per image",
        description=f"{caption} {listed(values)}.",
        number=lambda value: f"{value:.2f}".rstrip("0").rstrip("."),
    )
    return Figure(title="Backbone passes per image", caption=caption, picture=picture)


def parameters(results: Results) -> Figure:
    """Trainable parameters per task."""
    title = "Trained parameters per task"
    if not any(results.trainable_parameters):
        return Figure(
            title=title, caption="Nothing was trained by gradient: this strategy has no trainable parameters."
        )
    tips = [f"task {t + 1}: {count:,} parameters" for t, count in enumerate(results.trainable_parameters)]
    caption = "Numbers that were trained for each task: its adapter and the classifier head."
    picture = charts.bars(
        [Series(values=results.trainable_parameters, tips=tips)],
        axis_title="parameters",
        label="Trained parameters",
        description=f"{caption} {', '.join(map(amount, results.trainable_parameters))}.",
        number=amount,
    )
    return Figure(title=title, caption=caption, picture=picture)


def stored(results: Results) -> Figure:
    """Bytes stored per task."""
    sizes = results.stored_bytes_per_task
    totals = np.cumsum(sizes)
    tips = [f"task {t + 1}: {amount(size, 'B')}, {amount(totals[t], 'B')} in all" for t, size in enumerate(sizes)]
    caption = f"What each task added to what is kept; {amount(float(totals[-1]), 'B')} in all."
    picture = charts.bars(
        [Series(values=sizes, tips=tips, style="s4")],
        axis_title="bytes",
        label="Stored bytes per task",
        description=caption,
        number=lambda value: amount(value, "B"),
    )
    return Figure(title="Stored bytes per task", caption=caption, picture=picture)


def time_split(results: Results) -> Figure:
    """Seconds per task, stacked by what they were spent on."""
    rows, total = results.seconds_per_task, results.seconds
    divisor, unit = _time_unit(max(row.total for row in rows))
    stack = [
        Series(
            values=[getattr(row, part) / divisor for row in rows],
            tips=[
                f"task {t + 1}, {name}: {duration(getattr(row, part))} of {duration(row.total)}"
                for t, row in enumerate(rows)
            ],
            style=f"s{position}",
        )
        for position, (part, name) in enumerate(TIME_PARTS, start=1)
    ]
    processor = duration(results.cpu_seconds.total)
    caption = f"Real time of each task; {duration(total.total)} in all, {processor} of CPU time."
    picture = charts.bars(
        stack,
        axis_title=unit,
        label="Time per task",
        description=f"{caption} {_shares(total)}.",
        number=lambda value: f"{value:.3g}",
    )
    legend = tuple(
        (f"s{position}", f"{name}: {duration(getattr(total, part))}")
        for position, (part, name) in enumerate(TIME_PARTS, start=1)
    )
    return Figure(title="Where the time went", caption=caption, picture=picture, legend=legend)


def _shares(total: Seconds) -> str:
    return ", ".join(f"{name} {duration(getattr(total, part))}" for part, name in TIME_PARTS)


def _time_unit(longest: float) -> tuple[float, str]:
    return (1.0, "seconds") if longest < 180 else (60.0, "minutes") if longest < 10800 else (3600.0, "hours")


def task_blocks(count: int) -> list[range]:
    """Split ``count`` positions into at most ``MAX_CELLS`` neighbouring blocks of equal size (the last may be less)."""
    size = -(-count // MAX_CELLS)
    return [range(start, min(start + size, count)) for start in range(0, count, size)]


def span(block: range) -> str:
    """Return "3" or "3–4": the tasks of a block, counted from 1."""
    return str(block[0] + 1) if len(block) == 1 else f"{block[0] + 1}–{block[-1] + 1}"


def _block_means(matrix: npt.NDArray[np.float64], blocks: list[range]) -> npt.NDArray[np.float64]:
    measured = block_sums((~np.isnan(matrix)).astype(np.float64), blocks, blocks)
    sums = block_sums(np.nan_to_num(matrix), blocks, blocks)
    return np.divide(sums, measured, out=np.full_like(sums, np.nan), where=measured > 0)


def block_sums(matrix: npt.NDArray[np.float64], rows: list[range], columns: list[range]) -> npt.NDArray[np.float64]:
    """Return the sum of ``matrix`` over each pair of a row block and a column block."""
    folded = np.add.reduceat(matrix, [block[0] for block in rows], axis=0)
    return np.add.reduceat(folded, [block[0] for block in columns], axis=1)


def known(value: float) -> float | None:
    """Return None for NaN."""
    return None if np.isnan(value) else float(value)


def listed(values: Sequence[float | None]) -> str:
    """Return the values in words, for readers who do not see the picture."""
    return ", ".join("not measured" if value is None else f"{value:.1f}" for value in values)
