"""What the charts are drawn with: escaped SVG elements, colours, axis steps, numbers for people."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from markupsafe import Markup, escape

# Viridis (van der Walt and Smith 2015, CC0) at 0, 0.1, ... 1: even steps of lightness, also for colour-blind readers.
_VIRIDIS = (
    (68, 1, 84),
    (72, 36, 117),
    (65, 68, 135),
    (53, 95, 141),
    (42, 120, 142),
    (33, 145, 140),
    (34, 168, 132),
    (68, 191, 112),
    (122, 209, 81),
    (189, 223, 38),
    (253, 231, 37),
)


def element(name: str, attributes: Mapping[str, object], content: object = "") -> Markup:
    """Return ``<name attributes>content</name>``; all that is not ``Markup`` is escaped, floats are shortened.

    Names are ours, never a user's. An attribute that is None is left out.
    """
    parts = [f' {key}="{escape(_attribute(value))}"' for key, value in attributes.items() if value is not None]
    return Markup(f"<{name}{''.join(parts)}>{escape(content)}</{name}>")


def group(parts: Sequence[Markup]) -> Markup:
    """Join elements."""
    return Markup("").join(parts)


def picture(width: float, height: float, parts: Sequence[Markup], *, label: str, description: str) -> Markup:
    """Return a whole ``<svg>`` that scales with its place; a unit of its own is about a pixel.

    ``label`` is its short name for screen readers, ``description`` says in words what it shows. It is named by
    ``aria-label``, not by ``<title>``: browsers show that as a tooltip over every mark.
    """
    attributes = {"viewBox": f"0 0 {_attribute(width)} {_attribute(height)}", "role": "img", "aria-label": label}
    return element("svg", attributes, group([element("desc", {}, description), *parts]))


def colour(share: float) -> str:
    """Return the viridis colour of ``share`` (clipped to 0..1) as ``#rrggbb``."""
    position = min(max(share, 0.0), 1.0) * (len(_VIRIDIS) - 1)
    low = min(int(position), len(_VIRIDIS) - 2)
    rest = position - low
    mixed = (round(a + (b - a) * rest) for a, b in zip(_VIRIDIS[low], _VIRIDIS[low + 1], strict=True))
    return "#" + "".join(f"{part:02x}" for part in mixed)


def ink(fill: str) -> str:
    """Return black or white, whichever reads better on ``fill`` (contrast of WCAG 2.1)."""
    linear = [(int(fill[i : i + 2], 16) / 255) ** 2.2 for i in (1, 3, 5)]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return "#000" if (luminance + 0.05) ** 2 > 0.05 * 1.05 else "#fff"


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Return round numbers (1, 2 or 5 times a power of ten apart) that cover ``low`` to ``high``."""
    span = high - low if high > low else max(abs(high), 1.0)
    raw = span / about
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil((low + span) / step - 1e-9)
    return [index * step for index in range(first, last + 1)]


def thinned(count: int, room: float) -> list[int]:
    """Return which of ``count`` numbered positions (from 0) get a label when at most ``room`` fit.

    Counted from 1 they are 1, 2, 3, ... or 1, 3, 5, ... or the first and the round ones: 1, 5, 10, 15, ...
    """
    steps = (factor * 10**power for power in range(6) for factor in (1, 2, 5))
    step = next(step for step in steps if count / step <= max(room, 1.0))
    if step <= 2:
        return list(range(0, count, step))
    return [0, *range(step - 1, count, step)]


def percent(value: float | None) -> str:
    """Return "93.4 %", or a dash for None."""
    return "–" if value is None else f"{value:.1f} %"


def amount(value: float | None, unit: str = "") -> str:
    """Return a count in thousands, millions, ...: "950", "36.9 k", "4.1 MB" (with ``unit`` "B")."""
    if value is None:
        return "–"
    size, prefixes = float(value), ["", "k", "M", "G", "T"]
    while abs(size) >= 999.5 and len(prefixes) > 1:
        size /= 1000
        prefixes.pop(0)
    digits = f"{size:.0f}" if size == int(size) or abs(size) >= 100 else f"{size:.1f}"
    return f"{digits} {prefixes[0]}{unit}".rstrip()


def duration(seconds: float | None) -> str:
    """Return seconds as a person says them: "0.42 s", "12.3 s", "3 min 20 s", "2 h 05 min"."""
    if seconds is None:
        return "–"
    if seconds < 59.95:
        return f"{seconds:.2f} s" if seconds < 9.995 else f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def rough_duration(seconds: float) -> str:
    """Return seconds in one unit with little room: "12.3 s", "2.2 min", "1.4 h"."""
    if seconds < 99.95:
        return duration(seconds) if seconds < 59.95 else f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 3597 else f"{seconds / 3600:.1f} h"


def _attribute(value: object) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)
