"""The README runs as printed."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
from PIL import Image

from cl_adapters.benchmarks.cli.root import app


def blocks(repo_root: Path, language: str) -> list[str]:
    """The fenced blocks of that language."""
    text = (repo_root / "README.md").read_text(encoding="utf-8")
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)
    return [block for name, block in fenced if name == language]


def python(script: str, folder: Path) -> str:
    """What a script prints in a new process whose working folder is ``folder``."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_python_of_the_readme_runs_as_printed(repo_root: Path, tmp_path: Path) -> None:
    train, predict = blocks(repo_root, "python")[:2]
    assert len([line for line in train.splitlines() if line.strip()]) <= 11
    metrics = python(train, tmp_path)
    found = re.findall(r"Top1_Acc_Stream/eval_phase/test_stream\S* = ([0-9.]+)", metrics)
    assert len(found) == 5, metrics[-2000:]
    assert float(found[-1]) > 0.5  # ten classes: chance is 0.1
    Image.new("L", (8, 8)).save(tmp_path / "three.png")
    printed = python(predict + "\nprint(answers[0].name)\n", tmp_path)
    classes, name = printed.splitlines()
    assert sorted(eval(classes)) == list(range(10))
    assert name.isdigit()


def test_the_recipe_of_the_readme_runs_as_printed(repo_root: Path, tmp_path: Path) -> None:
    train, _, own = blocks(repo_root, "python")[:3]
    assert python(train.partition("strategy =")[0] + own, tmp_path) == ""


def test_classes_return_as_printed(repo_root: Path, tmp_path: Path) -> None:
    train, *others = blocks(repo_root, "python")
    (again,) = (block for block in others if "new_instances_benchmark" in block)
    metrics = python(train.partition("strategy =")[0] + again, tmp_path)
    (reached,) = re.findall(r"Top1_Acc_Stream/eval_phase/test_stream\S* = ([0-9.]+)", metrics)
    assert float(reached) > 0.5  # ten classes: chance is 0.1


def test_a_strategy_goes_on_as_printed(repo_root: Path, tmp_path: Path) -> None:
    train, *others = blocks(repo_root, "python")
    (going_on,) = (block for block in others if "strategy.save(" in block)
    metrics = python(
        train.partition("for experience")[0] + going_on + "print(strategy.clock.train_exp_counter)", tmp_path
    )
    assert metrics.splitlines()[-1] == "3"


def test_a_strategy_of_avalanche_runs_as_printed(repo_root: Path, tmp_path: Path) -> None:
    (train,) = (block for block in blocks(repo_root, "python") if "AdaptedNet(" in block)
    (reached,) = re.findall(r"Top1_Acc_Stream/eval_phase/test_stream\S* = ([0-9.]+)", python(train, tmp_path))
    assert float(reached) > 0.5  # ten classes: chance is 0.1
    ask = "from cl_adapters import AdapterModel\nprint(AdapterModel.load('replay-model').classes)"
    assert python(ask, tmp_path).strip() == str(list(range(10)))


def test_the_pool_of_the_readme_prints_what_stands_there(repo_root: Path, tmp_path: Path) -> None:
    """Trained in one process, asked in another; every line as printed, but for blanks at its end."""
    train, ask = (block for block in blocks(repo_root, "python") if '"digits-pool"' in block)
    (expected,) = blocks(repo_root, "text")
    assert "avalanche" not in ask
    assert python(train, tmp_path) == ""
    guard = "\nimport sys\nassert 'avalanche' not in sys.modules\n"
    printed = python(ask + guard, tmp_path)
    assert [line.rstrip() for line in printed.splitlines()] == expected.splitlines()


def test_the_readme_opens_with_exactly_two_commands(repo_root: Path) -> None:
    text = (repo_root / "README.md").read_text(encoding="utf-8")
    first = re.findall(r"```\n(.*?)```", text, flags=re.DOTALL)[:2]
    assert first == ["make demo\n", "make test\n"]


def test_every_command_of_the_readme_exists(repo_root: Path) -> None:
    """With every option that stands there; a backslash joins lines, a # begins a comment."""
    text = "\n".join(blocks(repo_root, "")).replace("\\\n", " ")
    used = set()
    for line in re.findall(r"^cl-adapters (.*)", text, flags=re.MULTILINE):
        words = line.partition(" #")[0].split()
        command: Any = typer.main.get_command(app)
        path = []
        while hasattr(command, "commands"):
            path.append(words.pop(0))
            command = command.commands[path[-1]]
        used.add(" ".join(path))
        known = {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}
        assert {word for word in words if word.startswith("--")} <= known, line
    assert {"run", "resume", "report", "predict", "list"} <= used
    assert {"pool create", "pool merge", "pool compress", "pool forget", "index build", "index query"} <= used


@pytest.mark.parametrize("name", ["docs/results.md", "docs/avalanche.md", "CONTRIBUTING.md"])
def test_links_lead_somewhere(repo_root: Path, name: str) -> None:
    assert f"({name})" in (repo_root / "README.md").read_text(encoding="utf-8")
    assert (repo_root / name).is_file()
