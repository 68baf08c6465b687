"""The report of a run: one self-contained HTML file, made from ``results.json``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cl_adapters._lazy import lazy_names

if TYPE_CHECKING:
    from cl_adapters.benchmarks.report.report import FILE_NAME, render, write_report

__all__ = ["FILE_NAME", "render", "write_report"]

if not TYPE_CHECKING:
    __getattr__, __dir__ = lazy_names(__name__, {"FILE_NAME": "report", "render": "report", "write_report": "report"})
