"""The registry: a new file in the package or an entry point is all that a plug-in needs."""

from __future__ import annotations

import importlib.metadata
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cl_adapters.errors import ClAdaptersError, UnknownName
from cl_adapters.registry import Registry

PACKAGE = "registry_test_plugins"
PLUGIN = """
from registry_test_plugins import things

@things.register("{name}")
class {cls}:
    pass
"""


@pytest.fixture
def things(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Registry[type]]:
    """A registry in a package made for the test, with the plug-ins "apple" and "bear"."""
    package = tmp_path / PACKAGE
    package.mkdir()
    (package / "__init__.py").write_text(
        f"from cl_adapters.registry import Registry\nthings = Registry('thing', {PACKAGE!r}, group={PACKAGE!r})\n"
    )
    for name in ("apple", "bear"):
        (package / f"{name}.py").write_text(PLUGIN.format(name=name, cls=name.title()))
    monkeypatch.syspath_prepend(str(tmp_path))
    yield importlib.import_module(PACKAGE).things
    for module in [name for name in sys.modules if name.split(".")[0] == PACKAGE]:
        del sys.modules[module]


def test_plugins_are_found_by_scanning(things: Registry[type]) -> None:
    assert f"{PACKAGE}.apple" not in sys.modules, "nothing is imported before it is asked for"
    assert things.get("apple").__name__ == "Apple"
    assert things.names() == ["apple", "bear"]


def test_a_new_file_is_all_it_takes(things: Registry[type]) -> None:
    origin = sys.modules[PACKAGE].__file__
    assert origin is not None
    Path(origin).with_name("cup.py").write_text(PLUGIN.format(name="cup", cls="Cup"))
    assert things.names() == ["apple", "bear", "cup"]


def test_unknown_name(things: Registry[type]) -> None:
    with pytest.raises(UnknownName, match=r"unknown thing 'aple'; did you mean 'apple'\? Known: apple, bear"):
        things.get("aple")


def test_a_registered_name_needs_no_scan(things: Registry[type]) -> None:
    things.register("own")(int)
    assert things.get("own") is int
    assert f"{PACKAGE}.apple" not in sys.modules


def test_taken_name_is_refused_and_kept(things: Registry[type]) -> None:
    apple = things.get("apple")
    with pytest.raises(
        ClAdaptersError, match=r"thing 'apple' is registered twice: by .*apple\.Apple and builtins\.int"
    ):
        things.register("apple")(int)
    assert things.get("apple") is apple


def test_registering_the_same_again_is_harmless(things: Registry[type]) -> None:
    apple = things.get("apple")
    assert things.register("apple")(apple) is apple


def test_name_of_classes_and_instances(things: Registry[type]) -> None:
    apple = things.get("apple")
    assert things.name_of(apple) == things.name_of(apple()) == "apple"
    with pytest.raises(UnknownName, match="unknown thing 'int'"):
        things.name_of(3)


def test_entry_points_are_plugins_too(things: Registry[type], monkeypatch: pytest.MonkeyPatch) -> None:
    point = importlib.metadata.EntryPoint(name="fraction", value="fractions:Fraction", group=PACKAGE)
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda *, group: [point] if group == PACKAGE else [])
    assert things.names() == ["apple", "bear", "fraction"]
    assert things.get("fraction").__module__ == "fractions"


def test_groups_of_entry_points_keep_their_names() -> None:
    """Other distributions name these in their pyproject.toml: a folder may move, its group may not."""
    from cl_adapters.adapters import adapters
    from cl_adapters.benchmarks.base import benchmarks
    from cl_adapters.codecs import codecs
    from cl_adapters.index import indexes
    from cl_adapters.merge import merges
    from cl_adapters.parts import parts
    from cl_adapters.predictors import predictors
    from cl_adapters.strategies.base import strategies
    from cl_adapters.strategies.instruct import instruct_methods

    registries: tuple[Registry[Any], ...] = (
        adapters,
        benchmarks,
        codecs,
        indexes,
        merges,
        parts,
        predictors,
        strategies,
        instruct_methods,
    )
    groups = "adapters benchmarks.data codecs index merge parts predictors strategies strategies.instruct"
    assert [registry.group for registry in registries] == [f"cl_adapters.{name}" for name in groups.split()]


def test_plugins_of_another_distribution_are_found_under_these_groups(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A distribution made for version 0.1, whose back-ends lay in ``cl_adapters.index`` itself."""
    from cl_adapters.index import indexes

    (tmp_path / "their_backend.py").write_text("class Theirs: ...\n")
    metadata = tmp_path / "theirs-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: theirs\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text("[cl_adapters.index]\ntheirs = their_backend:Theirs\n")
    monkeypatch.syspath_prepend(tmp_path)
    fresh: Registry[Any] = Registry(indexes.kind, indexes.package, group=indexes.group)
    assert fresh.names() == ["theirs"]  # ours are registered with the one registry, when they were first imported
    assert fresh.get("theirs").__module__ == "their_backend"
