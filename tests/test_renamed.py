"""Old import paths: found, the same objects, with a warning."""

from __future__ import annotations

import importlib
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from cl_adapters._renamed import NEW_PLACES

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("old", sorted(NEW_PLACES))
def test_an_old_path_leads_to_the_new_module(old: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        found = importlib.import_module(f"cl_adapters.{old}")
    assert found is importlib.import_module(f"cl_adapters.{NEW_PLACES[old]}")
    path = f"cl_adapters.{old}".replace("cl_adapters.strategies", "strategies")
    path = path.replace("cl_adapters.benchmarks", "benchmarks").replace(".", "/")
    assert not (ROOT / f"{path}.py").exists(), "this module is there again: its old path need not be kept"


def test_the_warning_names_both_places_and_is_the_importer_s() -> None:
    code = "import cl_adapters.randomness as old, cl_adapters._seeding as new; assert old is new"
    done = subprocess.run(
        [sys.executable, "-W", "always::DeprecationWarning", "-c", code], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    told = "<string>:1: DeprecationWarning: cl_adapters.randomness is now cl_adapters._seeding"
    assert told in done.stderr


def test_old_commands_still_run() -> None:
    line = [sys.executable, "-m", "cl_adapters.benchmarks.table", "--help"]
    done = subprocess.run(line, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "--seeds" in done.stdout


def test_other_names_are_not_found() -> None:
    with pytest.raises(ModuleNotFoundError, match=r"cl_adapters\.no_such_module"):
        importlib.import_module("cl_adapters.no_such_module")
