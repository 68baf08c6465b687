"""Runs of transformers models whose folders have moved, or that are gone on with from another folder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from cl_adapters import AdapterModel, AdapterPool
from cl_adapters.benchmarks.cli.root import app
from cl_adapters.benchmarks.data._instructions import read_tasks
from cl_adapters.benchmarks.run import instruct
from cl_adapters.benchmarks.run.experiment import resolve
from cl_adapters.errors import BackboneUnavailable, ConfigError, DataError, UnknownName
from cl_adapters.language.model import LanguageModel
from cl_adapters.parts.abstention import Abstention

ROWS = {"mood": [("the film was good", "yes"), ("a dull film", "no")], "colour": [("the colour of sky", "dark blue")]}
QUICK = {"epochs": 1, "batch": 2}


@pytest.fixture
def here(tiny_decoder: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with a model "llama" and tasks "tasks" in it."""
    folder = tmp_path / "here"
    shutil.copytree(tiny_decoder("llama"), folder / "llama")
    (folder / "tasks").mkdir()
    for name, rows in ROWS.items():
        lines = [json.dumps({"prompt": prompt, "answer": answer}) for prompt, answer in rows]
        for split in ("train", "test"):
            (folder / "tasks" / f"{name}.{split}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    monkeypatch.chdir(folder)
    return folder


def experiment(here: Path, **settings: Any) -> instruct.InstructExperiment:
    return instruct.InstructExperiment(
        method="retrieve", model="hf:llama", data=str(here / "tasks"), settings=QUICK | settings
    )


def answers(model: AdapterModel) -> Any:
    language = LanguageModel.of(model)
    prompts = ["the film was good", "the colour of sky"]
    return language.task_of(prompts), language.generate(prompts, 4, language.route_of(prompts))


def test_a_run_goes_on_from_another_folder(here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = instruct.run(experiment(here), here / "run")
    shutil.rmtree(here / "run" / "tasks" / "001")
    monkeypatch.chdir(tmp_path)
    again = instruct.resume(here / "run")
    assert (again.generation, again.train_loss) == (whole.generation, whole.train_loss)
    assert AdapterModel.load("here/run/tasks/001/model").class_names == {0: "colour", 1: "mood"}


def test_names_of_folders_are_recorded_as_found_from_anywhere(here: Path) -> None:
    assert resolve("simple_cil", "digits", backbone="hf:llama").backbone.name == f"hf:{here / 'llama'}"
    assert resolve("simple_cil", "digits", backbone="hf:someone/model").backbone.name == "hf:someone/model"
    assert resolve("simple_cil", "digits", backbone="timm:llama").backbone.name == "timm:llama"


def test_a_model_folder_that_has_moved_is_named(here: Path) -> None:
    instruct.run(experiment(here), here / "run")
    before = answers(AdapterModel.load(here / "run" / "tasks" / "001" / "model"))
    (here / "llama").rename(here / "elsewhere")
    cli = CliRunner()
    words = ["pool", "create", "pool", "--run", "run"]
    assert isinstance(cli.invoke(app, words).exception, BackboneUnavailable)
    assert cli.invoke(app, [*words, "--weights", "elsewhere"], catch_exceptions=False).exit_code == 0
    assert answers(AdapterModel.from_pool(AdapterPool.open("pool"))) == before
    done = cli.invoke(app, ["predict", "--run", "run", "--weights", "elsewhere", "--text", "a dull film", "--json"])
    (row,) = json.loads(done.stdout)
    assert row["class"] in ROWS and row["abstained"] is False


def test_an_index_is_asked_with_a_model_folder_that_has_moved(here: Path) -> None:
    instruct.run(experiment(here), here / "run")
    cli = CliRunner()
    for words in (["pool", "create", "pool", "--run", "run"], ["index", "build", "pool"]):
        assert cli.invoke(app, words, catch_exceptions=False).exit_code == 0
    ask = ["index", "query", "pool", "--text", "a dull film", "--json"]
    before = json.loads(cli.invoke(app, ask).stdout)
    (here / "llama").rename(here / "elsewhere")
    assert isinstance(cli.invoke(app, ask).exception, BackboneUnavailable)
    assert json.loads(cli.invoke(app, [*ask, "--weights", "elsewhere"]).stdout) == before
    wrong = ["--weights", "tasks"]
    assert isinstance(cli.invoke(app, [*ask, *wrong]).exception, BackboneUnavailable)


def test_predict_says_where_the_model_abstains(here: Path) -> None:
    instruct.run(experiment(here), here / "run")
    place = here / "run" / "tasks" / "001" / "model"
    model = AdapterModel.load(place)
    model.parts["abstention"] = Abstention(2.0, None, {})  # above every cosine
    model.save(place, overwrite=True)
    words = ["predict", "--run", "run", "--text", "a dull film"]
    cli = CliRunner(env={"COLUMNS": "200"})
    (row,) = json.loads(cli.invoke(app, [*words, "--json"]).stdout)
    assert row["abstained"] is True
    line = next(line for line in cli.invoke(app, words).stdout.splitlines() if "a dull film" in line)
    _, said, score, _, near = (cell.strip() for cell in line.strip("│ ").split("│"))
    assert (said, score) == ("none of these", "-")
    assert near.startswith(row["class"])


def test_answers_that_could_never_match_are_refused_before_training(here: Path) -> None:
    with pytest.raises(ConfigError, match=r"1 of 1 test answers of task 'colour' .* up to 2; .*max_new_tokens=2 or"):
        instruct.run(experiment(here, max_new_tokens=1), here / "run")
    assert not (here / "run").exists()
    instruct.run(experiment(here, max_new_tokens=2), here / "run")


@pytest.mark.parametrize(
    ("content", "message"), [(b"\n \n", "names no task"), ("mood\nf\u00e4rg".encode("latin-1"), "is not UTF-8 text")]
)
def test_an_order_that_cannot_be_read(content: bytes, message: str, here: Path) -> None:
    (here / "tasks" / "order.txt").write_bytes(content)
    with pytest.raises(DataError, match=rf"order\.txt {message}"):
        read_tasks("tasks")
    (here / "tasks" / "order.txt").write_bytes(b"\xef\xbb\xbfmood\r\ncolour\r\n")
    assert [task.name for task in read_tasks("tasks")] == ["mood", "colour"], "an editor's mark is no name"
    with pytest.raises(UnknownName, match=r"no folder 'absent' to take tasks from; unknown benchmark"):
        read_tasks("absent")
