"""Import names: one copy of every module, and nothing heavy before it is used."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import cl_adapters


def run(code: str, cwd: Path, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run ``code`` as ``python -c`` would be in ``cwd``, with ``path`` (if any) first on the import path."""
    environment = {**os.environ, "PYTHONPATH": str(path) if path else ""}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)


def check(code: str, cwd: Path) -> None:
    done = run(code, cwd)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("short_first", [True, False])
def test_short_names_are_the_same_modules(repo_root: Path, short_first: bool) -> None:
    names = ["benchmarks", "benchmarks.base", "benchmarks.data.digits", "strategies"]
    order = [name for short in names for name in ((short, f"cl_adapters.{short}")[:: 1 if short_first else -1])]
    check(
        f"""
import importlib, sys
for name in {order}:
    importlib.import_module(name)
for name in {names}:
    short, long = sys.modules[name], sys.modules["cl_adapters." + name]
    assert short is long, name
    assert long.__name__ == long.__spec__.name == "cl_adapters." + name, long.__spec__
import benchmarks.data.digits
from benchmarks.data import digits
from cl_adapters.benchmarks.data import digits as real
assert digits is real is benchmarks.data.digits
copies = [name for name in sys.modules if name.startswith(("benchmarks", "strategies"))]
assert all(sys.modules[name] is sys.modules["cl_adapters." + name] for name in copies), copies
""",
        repo_root,
    )


def test_strategies_are_the_same_classes_under_the_short_name(repo_root: Path) -> None:
    check(
        """
import strategies.simple_cil
from strategies import SimpleCIL
import cl_adapters.strategies.simple_cil as real
assert strategies.simple_cil is real
assert SimpleCIL is real.SimpleCIL
""",
        repo_root,
    )


def test_a_module_runs_by_its_short_name(repo_root: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.base"], cwd=repo_root, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_unknown_submodule_of_a_short_name_is_the_usual_error(repo_root: Path) -> None:
    done = run("import benchmarks.nothing_of_the_kind", repo_root)
    assert "ModuleNotFoundError: No module named 'benchmarks.nothing_of_the_kind'" in done.stderr


def test_short_name_of_another_copy_is_refused(repo_root: Path, tmp_path: Path) -> None:
    shutil.copytree(repo_root / "strategies", tmp_path / "strategies")
    done = run("import strategies", tmp_path, path=repo_root)
    assert "ImportError" in done.stderr
    assert "Import it as 'cl_adapters.strategies'" in done.stderr


def test_foreign_package_of_the_short_name_is_left_alone(repo_root: Path, tmp_path: Path) -> None:
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "__init__.py").write_text("OURS = False\n")
    done = run("import cl_adapters.benchmarks.base, benchmarks; print(benchmarks.OURS)", tmp_path, path=repo_root)
    assert done.stdout.strip() == "False", done.stderr


def test_importing_is_light(repo_root: Path) -> None:
    check("import sys, cl_adapters, cl_adapters.strategies; assert 'torch' not in sys.modules", repo_root)


def test_core_needs_neither_avalanche_nor_a_model_zoo(repo_root: Path) -> None:
    check(
        """
import importlib, pkgutil, sys
import cl_adapters
for name in cl_adapters.__all__:
    getattr(cl_adapters, name)
packages = []
for top in pkgutil.iter_modules(cl_adapters.__path__):
    if top.name not in ("strategies", "benchmarks"):
        found = importlib.import_module("cl_adapters." + top.name)
        for module in pkgutil.iter_modules(found.__path__) if top.ispkg else ():
            importlib.import_module(f"cl_adapters.{top.name}.{module.name}")
        packages += [top.name] * top.ispkg
assert {"adapters", "codecs", "index", "interchange", "merge", "parts", "pool", "predictors"} <= set(packages)
heavy = {"avalanche", "timm", "transformers", "torchvision", "faiss", "matplotlib"} & set(sys.modules)
assert not heavy, heavy
""",
        repo_root,
    )


def test_public_names() -> None:
    listed = dir(cl_adapters)
    for name in cl_adapters.__all__:
        assert name in listed
        assert getattr(cl_adapters, name) is not None
    with pytest.raises(AttributeError, match="FrozenBackbones"):
        _ = getattr(cl_adapters, "FrozenBackbones")  # noqa: B009 (the type checker knows that it is not there)
