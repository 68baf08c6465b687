"""Every strategy with every plugin, stream and setting does what docs/avalanche.md says."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from cl_adapters.backbones.frozen import FrozenBackbone
from cl_adapters.strategies.base import strategies
from tests.avalanche import matrix

NAMES = strategies.names()
WRITING = bool(os.environ.get("WRITE_MATRIX"))
MARKS = {kind: f"<!-- matrix of {kind}: written by tests/avalanche/matrix.py -->" for kind in ("plugins", "settings")}
END = "<!-- end -->"
compared = pytest.mark.skipif(WRITING, reason="the page is written")


@pytest.fixture
def backbone(tiny_vit: Callable[..., nn.Module]) -> FrozenBackbone:
    return FrozenBackbone.wrap(tiny_vit(width=16, heads=2, img_size=16, depth=2))


@pytest.fixture(scope="module")
def plain() -> dict[Any, Any]:
    """Strategies that were trained without a plugin, by what they were trained on."""
    return {}


def split(page: str, kind: str) -> tuple[str, str, str]:
    """What is before a matrix, the matrix, and what comes after it."""
    before, mark, rest = page.partition(MARKS[kind] + "\n")
    found, end, after = rest.partition("\n" + END)
    assert mark and end, f"docs/avalanche.md has no {MARKS[kind]}"
    return before + mark, found, end + after


@pytest.fixture(scope="module")
def page(repo_root: Path) -> Path:
    return repo_root / "docs" / "avalanche.md"


@compared
@pytest.mark.parametrize("row", matrix.PLUGINS)
@pytest.mark.parametrize("name", NAMES)
def test_plugin(name: str, row: str, backbone: FrozenBackbone, plain: dict[Any, Any], page: Path) -> None:
    said = matrix.read(split(page.read_text(encoding="utf-8"), "plugins")[1])
    assert matrix.of_plugin(name, matrix.PLUGINS[row], backbone, plain) == said[row, name]


@compared
@pytest.mark.parametrize("row", matrix.SETTINGS)
@pytest.mark.parametrize("name", NAMES)
def test_setting(name: str, row: str, backbone: FrozenBackbone, page: Path) -> None:
    said = matrix.read(split(page.read_text(encoding="utf-8"), "settings")[1])
    assert matrix.of_setting(name, matrix.SETTINGS[row], backbone) == said[row, name]


def test_the_page_has_these_rows_and_no_other(backbone: FrozenBackbone, plain: dict[Any, Any], page: Path) -> None:
    """With WRITE_MATRIX=1 they are measured and written there."""
    text = page.read_text(encoding="utf-8")
    for kind, rows in (("plugins", list(matrix.PLUGINS)), ("settings", list(matrix.SETTINGS))):
        before, found, after = split(text, kind)
        if WRITING:
            cells = {
                (row, name): matrix.of_plugin(name, matrix.PLUGINS[row], backbone, plain)
                if kind == "plugins"
                else matrix.of_setting(name, matrix.SETTINGS[row], backbone)
                for row in rows
                for name in NAMES
            }
            page.write_text(text := before + matrix.written(rows, NAMES, cells) + after, encoding="utf-8")
        else:
            assert found == matrix.written(rows, NAMES, matrix.read(found))
