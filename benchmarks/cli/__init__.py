"""The ``cl-adapters`` command, one file per group of commands."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from cl_adapters._lazy import lazy_names

if TYPE_CHECKING:
    from cl_adapters.benchmarks.cli.root import app

__all__ = ["app", "main"]

if not TYPE_CHECKING:
    __getattr__, __dir__ = lazy_names(__name__, {"app": "root"})


def main() -> None:
    """Entry point: Ctrl-C is quiet also while the commands are imported."""
    try:
        from cl_adapters.benchmarks.cli.root import main as commands

        commands()
    except KeyboardInterrupt:
        sys.exit(130)
