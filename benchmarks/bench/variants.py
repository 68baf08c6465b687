"""Naming the rows of a table: by what a run differs from the others of its strategy and benchmark."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

from cl_adapters.errors import ClAdaptersError, UnknownName

Options = tuple[tuple[str, str], ...]
"""The options of a run: (full name, value as text), sorted by name."""

_TYPE = "strategy.adapter.type"
_ADAPTER = "strategy.adapter."


def benchmark_variant(options: Options, others: Sequence[Options]) -> str:
    """Return by which of its options a benchmark differs from all of the same name in the table: "tasks=20"."""
    return ", ".join(f"{name.removeprefix('benchmark.')}={value}" for name, value in differing(options, others))


def strategy_variant(strategy: str, options: Options, others: Sequence[Options]) -> str:
    """Return the adapter type, if it is not the strategy's default, and by which options it differs from others.

    Options of the adapter are compared with those of the same type only: a LoRA has a rank because it is one.
    ``options`` are those of the run without those of its benchmark, ``others`` those of all runs of the strategy on it.
    """
    kind = dict(options).get(_TYPE)
    alike = [other for other in others if dict(other).get(_TYPE) == kind]
    parts = [] if kind is None or kind == default_adapter(strategy) else [kind]
    found = [pair for pair in differing(options, others) if not pair[0].startswith(_ADAPTER)]
    found += [pair for pair in differing(options, alike) if pair[0].startswith(_ADAPTER)]
    return ", ".join(parts + [f"{name.removeprefix('strategy.')}={value}" for name, value in found])


def differing(options: Options, others: Sequence[Options]) -> list[tuple[str, str]]:
    """Return those of ``options`` whose value is not the same in all ``others``."""
    tables: list[Mapping[str, str]] = [dict(other) for other in others]
    return [(name, value) for name, value in options if any(table.get(name) != value for table in tables)]


def completed(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """A recorded configuration with the defaults of options that came later, so that old and new runs share a row.

    What cannot be understood here (a strategy of another distribution) is left as it is.
    """
    from cl_adapters.benchmarks.run.experiment import Experiment

    try:
        return Experiment.from_plain(config).to_plain()
    except (ClAdaptersError, KeyError, TypeError):
        return config


@functools.cache
def default_adapter(strategy: str) -> str | None:
    """Return the adapter type that a strategy uses when none is asked for; None if it has or is known to have none."""
    from cl_adapters.config import to_plain
    from cl_adapters.strategies.base import strategies

    try:
        plain = to_plain(strategies.get(strategy).Config())
    except UnknownName:
        return None
    kind = (plain.get("adapter") or {}).get("type")
    return None if kind is None else str(kind)
