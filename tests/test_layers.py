"""Every package and module of the core has its layer in the import contract of pyproject.toml."""

from __future__ import annotations

import re
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "cl_adapters"
OUTSIDE = {"_alias", "_lazy", "_renamed", "_version"}
"""What makes names importable; it imports nothing of the core."""


def test_every_module_has_a_layer() -> None:
    text = (PACKAGE.parent / "pyproject.toml").read_text()
    contract = text.split('name = "Imports go downwards only"')[1].split("[[tool.importlinter")[0]
    named = set(re.findall(r"cl_adapters\.([\w.]+)", contract))
    found = {path.stem if path.suffix else path.name for path in PACKAGE.iterdir() if _is_module(path)}
    model = {f"model.{path.stem}" for path in (PACKAGE / "model").glob("*.py") if path.stem != "__init__"}
    assert named == found - OUTSIDE - {"model"} | model


def _is_module(path: Path) -> bool:
    return (path.suffix == ".py" and path.stem != "__init__") or (path / "__init__.py").is_file()
