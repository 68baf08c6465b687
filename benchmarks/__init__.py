"""Benchmarks, runner, report and command line."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cl_adapters._lazy import lazy_names

if TYPE_CHECKING:
    from cl_adapters.benchmarks.streams.avalanche import load_benchmark

__all__ = ["load_benchmark"]

if not TYPE_CHECKING:
    __getattr__, __dir__ = lazy_names("cl_adapters.benchmarks", {"load_benchmark": "streams.avalanche"})

if __name__ != "cl_adapters.benchmarks":  # imported by its short name from a checkout's root
    from cl_adapters._alias import alias

    alias(__name__, "cl_adapters.benchmarks", __file__)
