"""The bench of our strategies inside Avalanche prints its table."""

from __future__ import annotations

import re

from typer.testing import CliRunner

from cl_adapters.backbones.frozen import FrozenBackbone
from cl_adapters.benchmarks.bench import avalanche_table
from cl_adapters.benchmarks.bench._command import command_of


def test_a_number_or_a_note_in_each_column() -> None:
    words = ["--strategies", "simple_cil", "--seeds", "0", "1", "--train", "2", "--test", "1", "--epochs", "1"]
    done = CliRunner().invoke(command_of(avalanche_table.main, None), words)
    assert done.exit_code == 0, done.output
    lines = done.output.splitlines()
    assert lines[0] == "digits, seeds 0, 1, 2 training images of each class, 1 epochs"
    name, *cells = [word.strip() for word in lines[4].split("|")[1:-1]]
    assert name == "simple_cil" and len(cells) == len(avalanche_table.COLUMNS) == 9
    refused = [re.fullmatch(r"– \[\d\]", cell) is not None for cell in cells]
    assert refused == [False, True, True, True, False, True, False, False, False]
    assert all(
        re.fullmatch(r"\d+\.\d ± \d+\.\d( \[2\])?", cell) for cell, no in zip(cells, refused, strict=True) if not no
    )
    assert lines[6].startswith("[1] SimpleCIL trains nothing here, so optimizer= has no effect")
    assert lines[7].startswith("[2] SimpleCIL trains nothing here, so ReplayPlugin has no effect in training")
    assert lines[8].startswith("[3] SimpleCIL cannot use EWCPlugin: it protects earlier tasks")
    assert len(lines) == 9


def test_a_strategy_that_trains() -> None:
    """On a stream in which classes return, with another recipe."""
    backbone = FrozenBackbone.load("vit_glyph_tiny")
    data = avalanche_table.loaded("digits", 0, 2, 1)
    for column in ("by iteration", "repetition"):
        reached, said = avalanche_table.run("lae", column, backbone, data, 1, 0)
        assert reached is not None and 0 <= reached <= 100 and not said
