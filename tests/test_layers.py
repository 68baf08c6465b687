"""Every package and module of the core has its layer in the import contract; no file is in a circle."""

from __future__ import annotations

import re
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

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


def test_no_file_imports_itself_by_way_of_others() -> None:
    """Type hints count: the files can be read one after the other."""
    graph = pytest.importorskip("grimp").build_graph("cl_adapters", exclude_type_checking_imports=False)
    files = {name: graph.find_modules_directly_imported_by(name) for name in graph.modules}
    names = [name for name in TopologicalSorter(files).static_order() if name in files]
    assert len(names) == len(files) > 200


def _is_module(path: Path) -> bool:
    return (path.suffix == ".py" and path.stem != "__init__") or (path / "__init__.py").is_file()
