"""Runs on texts: the runner with interruptions, and the command line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from cl_adapters import AdapterModel, FrozenBackbone
from cl_adapters.benchmarks import load_benchmark
from cl_adapters.benchmarks.cli.root import app
from cl_adapters.benchmarks.run.experiment import resolve
from cl_adapters.benchmarks.run.runner import resume, run
from cl_adapters.errors import ClAdaptersError, ConfigError
from cl_adapters.strategies.sequential import Sequential


class Interrupted(Exception):
    pass


class StopAt:
    """A listener that stops a run when a task begins."""

    def __init__(self, task: int) -> None:
        self.task = task

    def task_started(self, task: int, tasks: int, names: list[str]) -> None:
        if task == self.task:
            raise Interrupted

    def progress(self, phase: str, done: int, total: int) -> None: ...

    def task_finished(self, results: Any) -> None: ...


def files_of(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted((folder / "tasks").rglob("*"))
        if path.is_file() and path.name != "row.json"  # which has the times
    }


@pytest.fixture
def experiment(table: Path, tiny_bert: Path) -> Callable[..., Any]:
    def build(strategy: str = "mos") -> Any:
        settings = {"benchmark.tasks": 3} | ({"train_epochs": 2, "alignment.epochs": 2} if strategy == "mos" else {})
        return resolve(strategy, f"text:{table}", backbone=f"hf:{tiny_bert}", settings=settings)

    return build


def test_a_resumed_run_is_the_uninterrupted_one(experiment: Callable[..., Any], tmp_path: Path) -> None:
    whole = run(experiment(), tmp_path / "whole")
    with pytest.raises(Interrupted):
        run(experiment(), tmp_path / "parts", listener=StopAt(2))
    resumed = resume(tmp_path / "parts")
    assert resumed.a_curve == whole.a_curve
    assert files_of(tmp_path / "parts") == files_of(tmp_path / "whole")
    assert (tmp_path / "parts" / "report.html").is_file()


def test_resuming_with_other_texts_is_refused(experiment: Callable[..., Any], table: Path, tmp_path: Path) -> None:
    content = table.read_text()
    with pytest.raises(Interrupted):
        run(experiment("simple_cil"), tmp_path / "run", listener=StopAt(1))
    try:
        table.write_text(content.replace("w0x1", "w0x2", 1))
        with pytest.raises(ConfigError, match="its inputs changed: data_fingerprint"):
            resume(tmp_path / "run")
    finally:
        table.write_text(content)


def test_command_line(table: Path, tiny_bert: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    cli = CliRunner()
    arguments = ["run", "--strategy", "simple_cil", "--benchmark", f"text:{table}", "--backbone", f"hf:{tiny_bert}"]
    done = cli.invoke(app, [*arguments, "--set", "benchmark.tasks=2", "--out", str(out)], catch_exceptions=False)
    assert done.exit_code == 0
    lines = tmp_path / "texts.txt"
    lines.write_text("w5x0\u2028w5x1\n\n", encoding="utf-8")  # a line separator of documents, within one line
    done = cli.invoke(app, ["predict", "--run", str(out), "--text", "w2x1 w2x2", "--text-file", str(lines), "--json"])
    assert done.exit_code == 0
    assert '"class": "intent 2"' in done.stdout
    assert '"text": "w5x0\\u2028w5x1"' in done.stdout
    assert done.stdout.count('"text"') == 2
    for wrong, message in (
        (["picture.png"], "takes texts, not images"),
        ([], "give image files, or texts"),
        (["picture.png", "--text", "a"], "not both"),
        (["--text-file", str(tmp_path / "none")], "cannot be read"),
    ):
        failed = cli.invoke(app, ["predict", "--run", str(out), *wrong])
        assert isinstance(failed.exception, ClAdaptersError)
        assert message in str(failed.exception)


def test_a_pool_is_asked_with_texts(table: Path, tiny_bert: Path, tmp_path: Path) -> None:
    backbone = FrozenBackbone.load(f"hf:{tiny_bert}")
    names = {label: f"intent {label}" for label in range(6)}
    strategy = Sequential(model=backbone, seed=0, train_epochs=1, keys="prototypes", evaluator=None, class_names=names)
    strategy.train(load_benchmark(f"text:{table}", backbone, options={"tasks": 1}).train_stream[0])
    pool = str(strategy.save_pool(tmp_path / "pool").path)
    cli = CliRunner()
    assert cli.invoke(app, ["index", "build", pool], catch_exceptions=False).exit_code == 0
    asked = ["--text", "w4x0 w4x1 w4x2", "--text", "w1x3 w1x3", "--k", "1", "--json"]
    done = cli.invoke(app, ["index", "query", pool, *asked], catch_exceptions=False)
    answers = json.loads(done.stdout)["answers"]
    assert [(answer["input"], answer["hits"][0]["name"]) for answer in answers] == [
        ("w4x0 w4x1 w4x2", "intent 4"),
        ("w1x3 w1x3", "intent 1"),
    ]
    for wrong, message in ((["a.png"], "takes texts, not images"), ([], "give image files")):
        failed = cli.invoke(app, ["index", "query", pool, *wrong])
        assert isinstance(failed.exception, ClAdaptersError)
        assert message in str(failed.exception)


def test_texts_for_a_model_of_images(table: Path, tiny_vit: Callable[..., Any]) -> None:
    model = AdapterModel(FrozenBackbone.load("vit_glyph_tiny"))
    with pytest.raises(ClAdaptersError, match="takes images, not texts"):
        model.predict_texts(["a"])
    with pytest.raises(ClAdaptersError, match="no tokenizer"):
        AdapterModel(FrozenBackbone.wrap(tiny_vit())).predict_texts(["a"])
