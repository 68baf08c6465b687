"""A chart of counts: how many there are of something at each place after each task, and where one was added."""

from __future__ import annotations

from collections.abc import Sequence, Set

import numpy as np
import numpy.typing as npt
from markupsafe import Markup

from cl_adapters.benchmarks.report.svg import element, picture, thinned

WIDTH = 560.0
LEFT, RIGHT, TOP, BOTTOM = 56.0, 14.0, 8.0, 44.0


def count_grid(
    counts: npt.NDArray[np.int64],
    *,
    rows: Sequence[str],
    row_title: str,
    tips: Sequence[Sequence[str]],
    added: Set[tuple[int, int]],
    label: str,
    description: str,
) -> Markup:
    """Return a grid of counts, places by tasks, the first place at the bottom.

    Args:
        counts: int [R, T]; cells of 0 stay empty.
        rows: R names of places, from the bottom up.
        row_title: what the places are.
        tips: [R][T] texts shown under the mouse.
        added: cells (row, task) in which the count grew; drawn in the second colour.
        label: short name for screen readers.
        description: what the picture shows, in words.
    """
    num_rows, num_tasks = counts.shape
    wide = min(46.0, (WIDTH - LEFT - RIGHT) / num_tasks)
    high = min(26.0, max(7.0, 300.0 / num_rows))
    gap = 1.5 if wide > 8 else 0.0
    bottom = TOP + high * num_rows
    parts = []
    for (row, task), count in np.ndenumerate(counts):
        if not count:
            continue
        x, y = LEFT + task * wide, bottom - (row + 1) * high
        new = (row, task) in added
        strength = 0.62 if new else 0.12 + 0.38 * int(count) / int(counts.max())
        box = {"x": x, "y": y, "width": wide - gap, "height": high - gap, "rx": 2 if gap else None}
        look = {"fill-opacity": strength, "class": f"bar {'s2' if new else 's3'}{'' if gap else ' fine'}"}
        parts.append(element("rect", {**box, **look, "data-tip": tips[row][task]}))
        if wide >= 15 and high >= 12:
            place = {"x": x + (wide - gap) / 2, "y": y + (high - gap) / 2, "class": "cell small"}
            parts.append(element("text", place, int(count)))
    for row in thinned(num_rows, num_rows * high / 15):
        y = bottom - (row + 0.5) * high
        parts.append(element("text", {"x": LEFT - 7, "y": y, "class": "tick end mid"}, rows[row]))
    for task in thinned(num_tasks, num_tasks * wide / 26):
        parts.append(element("text", {"x": LEFT + (task + 0.5) * wide, "y": bottom + 15, "class": "tick"}, task + 1))
    middle = LEFT + max(num_tasks * wide, 60.0) / 2
    parts.append(element("text", {"x": middle, "y": bottom + 35, "class": "axis"}, "after task"))
    turned = f"rotate(-90 12 {(TOP + bottom) / 2:.1f})"
    parts.append(element("text", {"x": 12.0, "y": (TOP + bottom) / 2, "class": "axis", "transform": turned}, row_title))
    return picture(WIDTH, bottom + BOTTOM, parts, label=label, description=description)
