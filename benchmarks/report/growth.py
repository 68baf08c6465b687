"""The figures of the report about growth: where, when and why a strategy added adapters, and how many there are."""

from __future__ import annotations

from collections import Counter

import numpy as np

from cl_adapters.benchmarks.report import charts
from cl_adapters.benchmarks.report.chart_grid import count_grid
from cl_adapters.benchmarks.report.charts import Series
from cl_adapters.benchmarks.report.figures import Figure
from cl_adapters.benchmarks.report.svg import amount
from cl_adapters.benchmarks.results.results import Expansion, Results

MOST_LINES = 10
COLUMNS = ("task", "block", "adapter", "score", "threshold", "pass", "batch")


def blocks_over_tasks(results: Results) -> Figure | None:
    """Adapters at each block after each task; None where the data do not decide how many there are."""
    if results.expansions is None or not results.adapters_per_block:
        return None
    per_task = results.adapters_per_block
    named = {int(block) for counts in per_task for block in counts}
    blocks = sorted(named | {entry.block for entry in results.expansions})
    counts = np.array([[row.get(str(block), 0) for row in per_task] for block in blocks], dtype=np.int64)
    if not counts.size:
        return None
    reasons: dict[tuple[int, int], list[Expansion]] = {}
    for entry in results.expansions:
        reasons.setdefault((blocks.index(entry.block), entry.task), []).append(entry)
    tips = [
        [_tip(block, task, int(counts[row, task]), reasons.get((row, task), [])) for task in range(results.num_tasks)]
        for row, block in enumerate(blocks)
    ]
    caption = "Adapters at each block of the backbone after each task; block 0 is the nearest to the image."
    where = Counter(entry.block for entry in results.expansions)
    grown = ", ".join(f"block {block}: {times} added" for block, times in sorted(where.items()))
    return Figure(
        title="Where it grew",
        caption=caption if grown else f"{caption} Nothing was added after the first task's.",
        picture=count_grid(
            counts,
            rows=[str(block) for block in blocks],
            row_title="block",
            tips=tips,
            added=set(reasons),
            label="Adapters per block and task",
            description=f"{caption} {grown}.",
        ),
        legend=(("s2", "an adapter was added in this task"), ("s3", "the adapters that were there")),
    )


def adapters_over_tasks(results: Results) -> Figure | None:
    """The number of adapters over the tasks; None where the data do not decide it."""
    if results.expansions is None or results.adapters is None:
        return None
    totals = results.adapters
    added = [sum(entry.task == task for entry in results.expansions) for task in range(results.num_tasks)]
    kept = [total - new for total, new in zip(totals, added, strict=True)]
    stack = [
        Series(
            values=kept,
            tips=[f"before task {t + 1}: {n}" if t else f"made for task 1: {n}" for t, n in enumerate(kept)],
            style="s3",
        ),
        Series(
            values=added, tips=[f"task {t + 1} added {n}, {totals[t]} in all" for t, n in enumerate(added)], style="s2"
        ),
    ]
    caption = f"{totals[-1]} in the end"
    if results.adapter_parameters is not None:
        caption += f", {amount(results.adapter_parameters[-1])} numbers"
    places = len({entry.block for entry in results.expansions})
    if places:
        caption += (
            f"; {sum(added)} were added in {sum(map(bool, added))} of {results.num_tasks} tasks. One in each later "
            f"task at each of the blocks that grew would have been {places * (results.num_tasks - 1)}"
        )
    picture = charts.bars(
        stack,
        axis_title="adapters",
        label="Adapters over the tasks",
        description=f"{caption}. After each task: {', '.join(map(str, totals))}.",
        number=lambda value: f"{value:g}",
    )
    return Figure(title="Number of adapters", caption=f"{caption}.", picture=picture)


def expansions(results: Results) -> Figure | None:
    """When and why adapters were added, as a table; None where that is not for the data to decide."""
    if results.expansions is None:
        return None
    title, rows = "When and why it grew", table(results)
    if not rows:
        return Figure(title=title, caption="No task looked new enough: nothing was added.")
    caption = "An adapter is added where the score, how new the images look to a block, exceeds the threshold."
    if len(rows) > MOST_LINES:
        caption += f" The first {MOST_LINES} of {len(rows)}; all of them are under Numbers."
    return Figure(title=title, caption=caption, columns=COLUMNS, rows=tuple(rows[:MOST_LINES]))


def table(results: Results) -> list[tuple[str, ...]]:
    """Every expansion as the cells of ``COLUMNS``; tasks, passes and batches from 1."""
    return [
        (
            str(entry.task + 1),
            str(entry.block),
            str(entry.slot),
            "–" if entry.score is None else f"{entry.score:.2f}",
            f"{entry.threshold:g}",
            str(entry.scan + 1),
            str(entry.batch + 1),
        )
        for entry in results.expansions or ()
    ]


def _tip(block: int, task: int, count: int, added: list[Expansion]) -> str:
    text = f"block {block}, after task {task + 1}: {count} adapter{'' if count == 1 else 's'}"
    for entry in added:
        score = "unknown" if entry.score is None else f"{entry.score:.2f}"
        text += f"; added in pass {entry.scan + 1}, batch {entry.batch + 1}: score {score} over {entry.threshold:g}"
    return text
