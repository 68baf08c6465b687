"""The figures of the report about retrieval: which adapter answered, and whether it was the right one."""

from __future__ import annotations

import numpy as np

from cl_adapters.benchmarks.report import charts
from cl_adapters.benchmarks.report.charts import Series
from cl_adapters.benchmarks.report.figures import Figure, block_sums, known, listed, span, task_blocks
from cl_adapters.benchmarks.report.svg import percent
from cl_adapters.benchmarks.results.results import Results, Routing


def routing(results: Results) -> Figure | None:
    """Which adapter answered against which was right; None without routing."""
    found = results.routing
    if found is None or not found.adapters:
        return None
    row_blocks, column_blocks = task_blocks(results.num_tasks), task_blocks(len(found.adapters))
    counts = block_sums(np.array(found.counts, dtype=np.float64), row_blocks, column_blocks)
    images = counts.sum(axis=1, keepdims=True)
    shares = np.divide(100 * counts, images, out=np.full_like(counts, np.nan), where=images > 0)
    rows = [span(block) for block in row_blocks]
    names, title = _names(found)
    columns = [
        names[block[0]] if len(block) == 1 else f"{names[block[0]]}–{names[block[-1]]}" for block in column_blocks
    ]
    right = {
        (row, column)
        for row, tasks in enumerate(row_blocks)
        for column, adapters in enumerate(column_blocks)
        if any(found.adapter_tasks[adapter] in tasks for adapter in adapters)
    }
    tips = [
        [
            f"images of task {name}, {title} {column}{' (right)' if (r, c) in right else ''}: "
            f"{counts[r, c]:.0f} of {images[r, 0]:.0f} ({percent(known(shares[r, c]))})"
            for c, column in enumerate(columns)
        ]
        for r, name in enumerate(rows)
    ]
    caption = (
        "Which adapter answered (columns) for the test images of each task (rows), last evaluation, in percent of the "
        "row. Framed: the adapter of the image's own task."
    )
    picture = charts.heat_map(
        shares,
        rows=[str(block[0] + 1) for block in row_blocks],
        columns=[_clipped(names[block[0]]) for block in column_blocks],
        row_title="images of task",
        column_title=f"{title} (the one that answered)",
        tips=tips,
        label="Routing",
        description=caption,
        tint="s3",
        marked=right,
    )
    return Figure(title="Which adapter answered", caption=caption, picture=picture)


def routing_curve(results: Results) -> Figure | None:
    """Share of images answered by an adapter of their own task, over the evaluations; None without routing."""
    found = results.routing
    if found is None or not found.right_share:
        return None
    tips = [f"after task {t + 1}: {percent(v)} answered by the right adapter" for t, v in enumerate(found.right_share)]
    picture = charts.lines(
        [Series(values=found.right_share, tips=tips, style="s3")],
        axis_title="right adapter, %",
        label="Images answered by the right adapter",
        description=f"{listed(found.right_share)}.",
    )
    caption = "Share of test images that were answered by the adapter of their own task."
    return Figure(title="Right adapter over time", caption=caption, picture=picture)


def confusions(results: Results) -> Figure | None:
    """The six most frequent wrong adapters, as a table; None without routing."""
    found = results.routing
    if found is None or not found.adapters:
        return None
    wrong = sorted(
        (-count, task, adapter)
        for task, row in enumerate(found.counts)
        for adapter, count in enumerate(row)
        if count and found.adapter_tasks[adapter] != task
    )
    images = sum(map(sum, found.counts))
    right_answers = images + sum(count for count, _, _ in wrong)  # the counts of the wrong ones are negative
    names, title = _names(found)
    rows = tuple(
        (str(task + 1), names[adapter], f"{-count:,}", percent(100 * -count / sum(found.counts[task])))
        for count, task, adapter in wrong[:6]
    )
    caption = f"Last evaluation: {right_answers:,} of {images:,} images were answered by an adapter of their own task."
    caption += " The most frequent others:" if rows else ""
    columns = ("images of task", f"answered by {title}", "images", "of the task") if rows else ()
    return Figure(title="Wrong adapters", caption=caption, columns=columns, rows=rows)


def _names(found: Routing) -> tuple[list[str], str]:
    """Return a name per adapter and what the name is: its task where each task has one adapter, else its id."""
    if len(set(found.adapter_tasks)) == len(found.adapters):
        return [str(task + 1) for task in found.adapter_tasks], "adapter of task"
    return list(found.adapters), "adapter"


def _clipped(name: str) -> str:
    return name if len(name) <= 7 else name[:6] + "…"
