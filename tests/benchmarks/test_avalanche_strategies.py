"""The bench of Avalanche's own strategies prints its table."""

from __future__ import annotations

import re

from typer.testing import CliRunner

from cl_adapters.benchmarks.bench import avalanche_strategies
from cl_adapters.benchmarks.bench._command import command_of


def test_one_row_for_each_strategy() -> None:
    words = ["--strategies", "Naive", "GEM", "--seeds", "0", "1", "--train", "1", "--epochs", "1"]
    done = CliRunner().invoke(command_of(avalanche_strategies.main, None), words)
    assert done.exit_code == 0, done.output
    rows = [line.split(" | ") for line in done.output.splitlines()[2:]]
    assert [row[0] for row in rows] == ["| Naive", "| GEM"]
    assert all(re.fullmatch(r"\d+\.\d ± \d+\.\d( \|)?", cell) for row in rows for cell in row[1:]), done.output
