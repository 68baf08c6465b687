"""The four charts of the report as inline SVG: heat map, lines, bars and stacked bars.

Colours of text, grid and series are classes of the page's style sheet, so the charts follow its light and dark
themes. Positions on the task axis count from 0 here and are shown from 1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from markupsafe import Markup

from cl_adapters.benchmarks.report.svg import colour, element, group, ink, picture, thinned, ticks

WIDTH, HEIGHT = 560.0, 240.0
LEFT, RIGHT, TOP, BOTTOM = 74.0, 14.0, 20.0, 44.0


@dataclass(frozen=True, kw_only=True)
class Series:
    """One line, or one part of stacked bars.

    Attributes:
        values: [T], None where there is nothing to show.
        tips: [T] texts shown under the mouse.
        style: class of the style sheet: "s1" to "s4".
    """

    values: Sequence[float | None]
    tips: Sequence[str]
    style: str = "s1"


@dataclass(frozen=True)
class _Scale:
    """Plot area of a chart over T tasks with a value axis from ``low`` to ``high``."""

    tasks: int
    low: float
    high: float

    @property
    def step(self) -> float:
        return (WIDTH - LEFT - RIGHT) / self.tasks

    def x(self, position: float) -> float:
        """Middle of the band of a task."""
        return LEFT + (position + 0.5) * self.step

    def y(self, value: float) -> float:
        return HEIGHT - BOTTOM - (value - self.low) / (self.high - self.low) * (HEIGHT - BOTTOM - TOP)


def heat_map(
    shares: npt.NDArray[np.float64],
    *,
    rows: Sequence[str],
    columns: Sequence[str],
    row_title: str,
    column_title: str,
    tips: Sequence[Sequence[str]],
    label: str,
    description: str,
    tint: str | None = None,
    marked: Set[tuple[int, int]] = frozenset(),
) -> Markup:
    """Return a heat map of percentages on a fixed scale from 0 to 100, with numbers where they fit.

    Args:
        shares: [R, C] percent; NaN cells stay empty.
        rows: R labels.
        columns: C labels.
        row_title: what the rows are.
        column_title: what the columns are.
        tips: [R][C] texts shown under the mouse.
        label: short name for screen readers.
        description: what the picture shows, in words.
        tint: a style ("s1" to "s4") whose strength shows the value, 0 being empty: for maps in which most cells
            are near 0 and the large ones matter. None takes viridis, in which every step is as visible.
        marked: cells (row, column) with a frame.
    """
    num_rows, num_columns = shares.shape
    left = LEFT - 18
    size = min(150.0, (WIDTH - left - RIGHT) / max(num_rows, num_columns))
    wide, high = size * num_columns, size * num_rows
    gap = 1.5 if size > 14 else 0.0
    plate = {"x": left - 1, "y": TOP - 1, "width": wide + 2 - gap, "height": high + 2 - gap, "class": "plate"}
    cells, parts = [], [element("rect", plate)]
    for (row, column), share in np.ndenumerate(shares):
        framed = (row, column) in marked and size > 10
        if np.isnan(share) or (tint and share == 0 and not framed):
            continue
        x, y, side = left + column * size, TOP + row * size, size - gap
        box = {"x": x, "y": y, "width": side, "height": side, "rx": 2 if gap else None}
        cells.append(element("rect", {**box, **_fill(share, tint, framed), "data-tip": tips[row][column]}))
        if size >= 19:
            text = f"{share:.1f}" if size >= 36 and share < 99.95 else f"{share:.0f}"
            style = f"cell {_ink(share, tint)}{' small' if size < 30 else ''}"
            cells.append(element("text", {"x": x + side / 2, "y": y + side / 2, "class": style}, text))
    parts.append(element("g", {"class": None if gap else "fine"}, group(cells)))
    for row in thinned(num_rows, high / 15):
        parts.append(
            element("text", {"x": left - 7, "y": TOP + (row + 0.5) * size, "class": "tick end mid"}, rows[row])
        )
    for column in thinned(num_columns, wide / 26):
        place = {"x": left + (column + 0.5) * size, "y": TOP + high + 15, "class": "tick"}
        parts.append(element("text", place, columns[column]))
    bottom = TOP + max(high, 100.0)
    parts.append(element("text", {"x": left + max(wide, 120.0) / 2, "y": bottom + 35, "class": "axis"}, column_title))
    parts.append(_turned(12.0, TOP + max(high, 100.0) / 2, row_title))
    parts.append(_colour_bar(left, bottom + 52, tint))
    return picture(WIDTH, bottom + 84, parts, label=label, description=description)


def lines(
    series: Sequence[Series], *, axis_title: str, label: str, description: str, reference: float | None = None
) -> Markup:
    """Return curves of percentages over the tasks, with a dotted horizontal line at ``reference``.

    The value axis is no wider than the data, at least 20 points long, and always labelled. The first curve is drawn
    strongest and has its values written beside its points if few.
    """
    measured = [value for one in series for value in one.values if value is not None] or [0.0]
    high = min(100.0, ticks(0.0, max(measured) + 4)[-1])
    low = max(0.0, min(np.floor((min(measured) - 4) / 10) * 10, high - 20.0))
    tasks = len(series[0].values)
    scale = _Scale(tasks, float(low), float(high))
    parts = _axes(scale, axis_title, lambda value: f"{value:g}", zero=False)
    if reference is not None:
        parts.append(_across(scale.y(reference), "reference"))
    for one in reversed(series):
        parts += _line(one, scale)
    if tasks <= 12:
        parts += _point_values(series, scale)
    return picture(WIDTH, HEIGHT, parts, label=label, description=description)


def bars(
    stack: Sequence[Series],
    *,
    axis_title: str,
    label: str,
    description: str,
    number: Callable[[float], str],
    reference: float | None = None,
) -> Markup:
    """Return bars over the tasks, with a dotted horizontal line at ``reference``.

    Several series are stacked from the bottom up; a single one may go below zero. ``number`` writes a value of the
    axis, and above the bars of a single series if there is room for all.
    """
    tasks = len(stack[0].values)
    tops = [sum(one.values[task] or 0.0 for one in stack) for task in range(tasks)]
    steps = ticks(min(0.0, *tops), max(0.0, reference or 0.0, *tops))
    scale = _Scale(tasks, steps[0], steps[-1])
    wide, fine = (min(46.0, scale.step * 0.72), "") if scale.step > 4 else (scale.step, " fine")
    parts, values = _axes(scale, axis_title, number, zero=True), []
    room = scale.step / 6.8  # letters between two bars
    written = len(stack) == 1 and tasks <= 12 and all(len(number(top)) <= room for top in tops)
    for task in range(tasks):
        level = 0.0
        for one in stack:
            value = one.values[task]
            if value is None:
                continue
            top, bottom = max(level, level + value), min(level, level + value)
            level += value
            style = one.style if value >= 0 else "below"
            box = {"x": scale.x(task) - wide / 2, "y": scale.y(top), "width": wide, "class": f"bar {style}{fine}"}
            tall = scale.y(bottom) - scale.y(top)
            parts.append(element("rect", {**box, "height": tall, "data-tip": one.tips[task]}))
            if written:
                place = {"x": scale.x(task), "y": scale.y(top) - 5, "class": "value"}
                values.append(element("text", place, number(value)))
    if reference is not None:
        parts.append(_across(scale.y(reference), "reference"))
    return picture(WIDTH, HEIGHT, [*parts, *values], label=label, description=description)


def _line(one: Series, scale: _Scale) -> list[Markup]:
    points = [(task, value) for task, value in enumerate(one.values) if value is not None]
    path, previous = "", -2
    for task, value in points:  # a gap in the data is a gap in the line
        path += f"{'L' if task == previous + 1 else 'M'}{scale.x(task):.1f} {scale.y(value):.1f}"
        previous = task
    parts = [element("path", {"d": path, "class": f"line {one.style}"})] if path else []
    radius = 3.5 if scale.step > 12 else 2.2
    for task, value in points:
        if scale.step > 5 or len(points) == 1:
            dot = {"cx": scale.x(task), "cy": scale.y(value), "r": radius, "class": f"dot {one.style}"}
            parts.append(element("circle", dot))
        # A dot is hard to hit with a mouse: the target is larger than what is seen.
        target = {"cx": scale.x(task), "cy": scale.y(value), "r": max(radius, min(9.0, scale.step / 2))}
        parts.append(element("circle", {**target, "class": "target", "data-tip": one.tips[task]}))
    return parts


def _point_values(series: Sequence[Series], scale: _Scale) -> list[Markup]:
    """Values of the first series, above its points, or below where another line passes above."""
    parts = []
    for task, value in enumerate(series[0].values):
        if value is None:
            continue
        others = [other for one in series[1:] if (other := one.values[task]) is not None]
        below = any(other > value for other in others) and scale.y(value) + 18 < HEIGHT - BOTTOM
        place = {"x": scale.x(task), "y": scale.y(value) + (18 if below else -9), "class": "value"}
        parts.append(element("text", place, f"{value:.1f}"))
    return parts


def _axes(scale: _Scale, title: str, number: Callable[[float], str], zero: bool) -> list[Markup]:
    parts = []
    for value in ticks(scale.low, scale.high):
        if not scale.low - 1e-9 <= value <= scale.high + 1e-9:
            continue
        y = scale.y(value)
        style = "base" if value == (0 if zero else scale.low) else "grid"
        parts.append(_across(y, style))
        parts.append(element("text", {"x": LEFT - 7, "y": y, "class": "tick end mid"}, number(value)))
    for task in thinned(scale.tasks, (WIDTH - LEFT - RIGHT) / 28):
        parts.append(element("text", {"x": scale.x(task), "y": HEIGHT - BOTTOM + 16, "class": "tick"}, task + 1))
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(element("text", {"x": middle, "y": HEIGHT - 8, "class": "axis"}, "task"))
    parts.append(_turned(12.0, (TOP + HEIGHT - BOTTOM) / 2, title))
    return parts


def _turned(x: float, y: float, text: str) -> Markup:
    return element("text", {"x": x, "y": y, "class": "axis", "transform": f"rotate(-90 {x:.1f} {y:.1f})"}, text)


def _across(y: float, style: str) -> Markup:
    return element("line", {"x1": LEFT, "x2": WIDTH - RIGHT, "y1": y, "y2": y, "class": style})


def _fill(share: float, tint: str | None, framed: bool) -> dict[str, object]:
    frame = " framed" if framed else ""
    if tint is None:
        return {"fill": colour(share / 100), "class": frame.strip() or None}
    # A cell with one image in a hundred must still be seen to be there.
    return {"fill-opacity": 0.07 + 0.93 * share / 100, "class": f"bar {tint}{frame}"}


def _ink(share: float, tint: str | None) -> str:
    """Style of the number in a cell: readable on the cell's colour in the light and in the dark theme."""
    if tint is None:
        return "dark" if ink(colour(share / 100)) == "#000" else "light"
    return "plain" if share < 55 else "dark" if share < 85 else "inverse"


def _colour_bar(x: float, y: float, tint: str | None) -> Markup:
    wide, slices = 200.0, 50
    part = wide / slices
    blocks = []
    for index in range(slices):
        place = {"x": x + index * part, "y": y, "width": part, "height": 10}
        blocks.append(element("rect", {**place, **_fill(100 * (index + 0.5) / slices, tint, framed=False)}))
    names = [
        element("text", {"x": x + wide * share, "y": y + 24, "class": "tick"}, f"{100 * share:.0f} %")
        for share in (0.0, 0.5, 1.0)
    ]
    return group([element("g", {"class": "fine"}, group(blocks)), *names])
