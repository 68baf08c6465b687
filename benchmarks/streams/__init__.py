"""From benchmark data to what a backbone takes: transforms, tokens, data sets, Avalanche's streams."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cl_adapters._lazy import lazy_names

if TYPE_CHECKING:
    from cl_adapters.benchmarks.streams.avalanche import load_benchmark, to_avalanche

__all__ = ["load_benchmark", "to_avalanche"]

if not TYPE_CHECKING:
    __getattr__, __dir__ = lazy_names(__name__, {"load_benchmark": "avalanche", "to_avalanche": "avalanche"})
