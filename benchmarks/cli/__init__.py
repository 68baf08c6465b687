"""The ``cl-adapters`` command, one file per group of commands."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cl_adapters._lazy import lazy_names

if TYPE_CHECKING:
    from cl_adapters.benchmarks.cli.root import app, main

__all__ = ["app", "main"]

if not TYPE_CHECKING:
    __getattr__, __dir__ = lazy_names(__name__, {"app": "root", "main": "root"})
