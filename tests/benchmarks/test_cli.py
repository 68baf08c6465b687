"""The command line as a user meets it: real processes for what must work in a new one, the app itself for the rest."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from typer.testing import CliRunner

from cl_adapters.benchmarks.cli.root import app
from cl_adapters.benchmarks.run.experiment import presets
from cl_adapters.errors import ClAdaptersError


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with pictures and random weights of timm's tiny test model."""
    root = tmp_path_factory.mktemp("cli")
    torch.manual_seed(0)
    state = timm.create_model("test_vit", pretrained=False).state_dict()
    save_file({key: value.contiguous() for key, value in state.items()}, root / "w.safetensors")
    draw = np.random.default_rng(0)
    for name in ("cat", "dog", "emu", "fox"):
        (root / "photos" / name).mkdir(parents=True)
        for i in range(6):
            Image.fromarray(draw.integers(0, 256, (20, 20, 3), dtype=np.uint8)).save(
                root / "photos" / name / f"{i}.png"
            )
    return root


def arguments(place: Path, *more: str) -> list[str]:
    return [
        *("run", "--strategy", "mos", "--benchmark", f"folder:{place / 'photos'}", "--backbone", "timm:test_vit"),
        *("--weights", str(place / "w.safetensors"), "--set", "img_size=32", "--set", "benchmark.tasks=2"),
        *("--set", "train_epochs=1", "--set", "alignment.epochs=1", *more),
    ]


def command(*words: str | Path) -> subprocess.CompletedProcess[str]:
    """Run `cl-adapters` in a new process."""
    line = [sys.executable, "-m", "cl_adapters.benchmarks.cli", *map(str, words)]
    return subprocess.run(line, capture_output=True, text=True, check=False, timeout=300)


def failure(*words: str) -> str:
    """The message of a call that must fail with one of the package's errors."""
    result = CliRunner().invoke(app, list(words))
    assert isinstance(result.exception, ClAdaptersError), (result.output, result.exception)
    return str(result.exception)


def test_run_then_predict_in_a_new_process(place: Path) -> None:
    out = place / "run"
    done = command(*arguments(place, "--out", str(out)))
    assert done.returncode == 0, done.stderr
    assert "A-bar" in done.stdout
    assert str(out / "report.html") in done.stdout.replace("\n", "")
    image = place / "photos" / "dog" / "0.png"
    answer = command("predict", "--run", out, "--json", image)
    assert answer.returncode == 0, answer.stderr
    (row,) = json.loads(answer.stdout)
    assert row["file"] == str(image)
    assert row["class"] in ("cat", "dog", "emu", "fox")
    assert row["adapter"] in (0, 1)
    table = CliRunner().invoke(app, ["predict", "--run", str(out), str(image)])
    assert row["class"] in table.output


def test_errors_are_one_line_and_exit_code_2(place: Path) -> None:
    failed = command("run", "--strategy", "moss", "--benchmark", "digits")
    assert failed.returncode == 2
    assert "Traceback" not in failed.stderr
    assert "unknown strategy 'moss'; did you mean 'mos'? Known:" in failed.stderr.replace("\n", " ")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--set", "lrr=1"], r"unknown option .*lrr; did you mean 'lr'"),
        (["--set", "lr=fast"], "lr"),
        (["--set", "lr"], "KEY=VALUE"),
        (["--set", "adapter.botleneck=3"], "did you mean 'bottleneck'"),
        (["--set", "adapter=botleneck"], "did you mean 'bottleneck'"),
        (["--set", "benchmark.task=3"], "did you mean 'tasks'"),
        (["--set", "adapter_momentum=2"], "adapter_momentum must be in"),
        (["--device", "cuda:99"], "cannot be used here"),
        (["--backbone", "timm:test_vitt"], "unknown timm model"),
        (["--backbone", "vit_glyph_tinny"], "unknown backbone"),
    ],
)
def test_bad_settings_name_what_was_wrong(place: Path, change: list[str], message: str) -> None:
    text = failure(*arguments(place, "--out", str(place / "never"), *change))
    assert re.search(message, text), text
    assert not (place / "never").exists()


def test_unknown_benchmark_and_kind() -> None:
    assert "did you mean 'digits'" in failure("run", "--strategy", "mos", "--benchmark", "digit")
    assert "did you mean 'strategies'" in failure("list", "strategy")


def test_a_preset_gives_the_settings_and_the_folders_name(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    settings = ["--preset", "glyphs", "--set", "benchmark.augmentation.flip=false"]
    result = CliRunner().invoke(app, arguments(place, *settings))
    assert result.exit_code == 0, (result.output, result.exception)
    recorded = json.loads((place / "runs" / "mos-glyphs-s0" / "config.json").read_text(encoding="utf-8"))["experiment"]
    assert recorded["benchmark"]["name"] == "folder"
    assert (recorded["strategy"]["train_mb_size"], recorded["strategy"]["lr"]) == (16, 0.1)  # of the preset
    assert (recorded["strategy"]["train_epochs"], recorded["strategy"]["reg"]) == (1, 0.1)  # --set; default
    assert recorded["backbone"]["name"] == "timm:test_vit"
    message = failure(*arguments(place, "--preset", "glyph"))
    assert message.startswith("unknown preset of mos 'glyph'; did you mean 'glyphs'? Known: ")


def test_presets_are_listed_with_a_line() -> None:
    result = CliRunner(env={"COLUMNS": "250"}).invoke(app, ["list", "presets"])
    assert result.exit_code == 0
    rows = [
        [cell.strip() for cell in line.strip("│ ").split("│")] for line in result.output.splitlines() if "│" in line
    ]
    assert len(rows) == len(presets())
    assert ["sema", "vtab"] in [row[:2] for row in rows]
    assert all(strategy and name and len(line) > 20 for strategy, name, line in rows)


def test_predict_with_a_file_that_is_no_image(place: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert CliRunner().invoke(app, arguments(place, "--out", str(out))).exit_code == 0
    (tmp_path / "x.png").write_text("no image", encoding="utf-8")
    assert "x.png" in failure("predict", "--run", str(out), str(tmp_path / "x.png"))
    assert "nothing.png" in failure("predict", "--run", str(out), str(tmp_path / "nothing.png"))
    assert "config.json is missing" in failure("predict", "--run", str(tmp_path), str(tmp_path / "x.png"))


@pytest.mark.parametrize(
    "kind", ["strategies", "methods", "benchmarks", "adapters", "codecs", "indexes", "merges", "parts", "predictors"]
)
def test_every_plugin_is_listed_with_a_line(kind: str) -> None:
    result = CliRunner(env={"COLUMNS": "200"}).invoke(app, ["list", kind])
    assert result.exit_code == 0
    rows = [line.strip("│ ").split("│") for line in result.output.splitlines() if line.startswith("│")]
    assert rows
    assert all(len(row) == 2 and row[1].strip() for row in rows)
