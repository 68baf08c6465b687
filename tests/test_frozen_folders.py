"""Folders that an earlier release wrote (``tests/data/frozen``) are read, answered from and gone on with as then."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from cl_adapters._io import sealed

DATA = Path(__file__).parent / "data"
FROZEN = DATA / "frozen"
EXPECTED: dict[str, Any] = json.loads((FROZEN / "expected.json").read_text(encoding="utf-8"))
CLOSE = 1e-5
"""Of logits and scores on another processor, where the last bits may differ."""


@pytest.fixture(scope="module")
def maker() -> Any:
    """The script that wrote the folders."""
    spec = importlib.util.spec_from_file_location("make_frozen", DATA / "make_frozen.py")
    assert spec is not None and spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def same_machine(maker: Any) -> bool:
    """Whether sums have the same last bits here as where the folders were written."""
    here: dict[str, str] = maker.machine()
    return here == EXPECTED["machine"] and torch.get_num_threads() == 1


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of everything, to be read and written."""
    return Path(shutil.copytree(FROZEN, tmp_path_factory.mktemp("frozen") / "copy"))


@pytest.fixture(scope="module")
def found(maker: Any, place: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What the folders answer now: tensors, and plain values."""
    observed: tuple[dict[str, Tensor], dict[str, Any]] = maker.observe(place)
    return observed


def test_labels_adapters_records_and_hits_are_those_of_then(found: tuple[dict[str, Tensor], dict[str, Any]]) -> None:
    """Models of four strategies, a pool with a compressed record, part of it, it behind its index, the index itself."""
    assert found[1]["pool"]["ok"]
    assert found[1].keys() == EXPECTED["found"].keys()
    for name, expected in EXPECTED["found"].items():
        assert found[1][name] == expected, name


def test_logits_and_scores_are_those_of_then(
    found: tuple[dict[str, Tensor], dict[str, Any]], same_machine: bool
) -> None:
    """To the last bit on the same kind of processor with the same torch."""
    expected = load_file(FROZEN / "expected.safetensors")
    assert found[0].keys() == expected.keys()
    for name, then in expected.items():
        now = found[0][name]
        assert (now.shape, now.dtype) == (then.shape, then.dtype), name
        assert torch.equal(now, then) if same_machine else torch.allclose(now, then, rtol=CLOSE, atol=CLOSE), name


def test_reading_changes_no_file(found: tuple[dict[str, Tensor], dict[str, Any]], place: Path) -> None:
    """A model, a pool and an index are as they were after everything was asked of them."""
    for name in ("mos", "sema", "ranpac", "lae", "pool"):
        assert contents(place / name) == contents(FROZEN / name), name


def test_a_saved_model_is_the_same_files_again(maker: Any, place: Path, tmp_path: Path) -> None:
    """Names, tensors and model.json, byte for byte; model.json ends with its own checksum, which it had not then."""
    for name in maker.MODELS:
        copy = maker.AdapterModel.load(place / name).save(tmp_path / name)
        card = json.loads((copy / "model.json").read_text(encoding="utf-8"))
        assert card == sealed({key: value for key, value in card.items() if key != "sha256"}), name
        del card["sha256"]
        (copy / "model.json").write_text(json.dumps(card, indent=1) + "\n", encoding="utf-8")
        assert contents(copy) == contents(FROZEN / name), name


def contents(folder: Path) -> dict[str, bytes]:
    """Every file by name, locks left out."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


@pytest.mark.parametrize("name", sorted(EXPECTED["runs"]))
def test_an_interrupted_run_goes_on_to_the_numbers_of_the_whole_one(
    name: str, maker: Any, place: Path, same_machine: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Accuracy matrices exactly and all saved tensors; on another processor an answer may fall otherwise."""
    expected = EXPECTED["runs"][name]
    if name.startswith("instruct"):
        pytest.importorskip("transformers", reason="needs transformers: pip install cl-adapters[text]")
        monkeypatch.chdir(place)  # where the run's decoder and tasks are
        maker.call("instruct", "--resume", place / name)
        tolerance = 50.0  # two or three test prompts per task
    else:
        maker.call("resume", place / name, "--threads", "1")
        tolerance = 5.0
    measured = maker.measured(place / name)
    if same_machine:
        assert measured == expected
        return
    for way, rows in expected["matrices"].items():
        for row, then in zip(measured["matrices"][way], rows, strict=True):
            assert row == [None if cell is None else pytest.approx(cell, abs=tolerance) for cell in then]
