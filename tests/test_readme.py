"""The README runs as printed."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from cl_adapters.benchmarks.cli import app


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
    train, predict = blocks(repo_root, "python")
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


def test_the_readme_opens_with_exactly_two_commands(repo_root: Path) -> None:
    text = (repo_root / "README.md").read_text(encoding="utf-8")
    first = re.findall(r"```\n(.*?)```", text, flags=re.DOTALL)[:2]
    assert first == ["make demo\n", "make test\n"]


def test_every_command_of_the_readme_exists(repo_root: Path) -> None:
    known = {command.name for command in app.registered_commands}
    used = re.findall(r"^cl-adapters (\w+)", "\n".join(blocks(repo_root, "")), flags=re.MULTILINE)
    assert set(used) <= known
    assert {"run", "resume", "report", "predict", "list"} <= set(used)


@pytest.mark.parametrize("name", ["docs/results.md", "CONTRIBUTING.md"])
def test_links_lead_somewhere(repo_root: Path, name: str) -> None:
    assert f"({name})" in (repo_root / "README.md").read_text(encoding="utf-8")
    assert (repo_root / name).is_file()
