"""The command that runs a whole table: how its words are read, what it would run, and one small table for real."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from cl_adapters.benchmarks.bench import table
from cl_adapters.benchmarks.bench._command import command_of
from cl_adapters.benchmarks.bench.table import Choice, jobs, known_strategies
from cl_adapters.benchmarks.run.experiment import resolve
from cl_adapters.errors import ConfigError
from cl_adapters.strategies.base import strategies


@pytest.mark.parametrize(
    ("text", "name", "settings", "folder"),
    [
        ("mos", "mos", {}, "mos"),
        ("lae:adapter=lora", "lae", {"adapter": "lora"}, "lae_adapter=lora"),
        ("lae:adapter=lora,lr=0.1", "lae", {"adapter": "lora", "lr": "0.1"}, "lae_adapter=lora_lr=0.1"),
        ("lae,adapter.rank=4", "lae", {"adapter.rank": "4"}, "lae_adapter.rank=4"),
        ("sema:blocks=[4,5],lr=1", "sema", {"blocks": "[4,5]", "lr": "1"}, "sema_blocks=_4_5_lr=1"),
        ("glyphs:200", "glyphs:200", {}, "glyphs_200"),
        ("glyphs:200,tasks=20", "glyphs:200", {"tasks": "20"}, "glyphs_200_tasks=20"),
        ("glyphs:tasks=20,classes=200", "glyphs", {"tasks": "20", "classes": "200"}, "glyphs_tasks=20_classes=200"),
        ("folder:/a b/x,y/../z", "folder:/a b/x,y/../z", {}, "folder_a_b_x_y_.._z"),
    ],
)
def test_choices_are_read_as_written(text: str, name: str, settings: dict[str, str], folder: str) -> None:
    choice = Choice.parse(text)
    assert (choice.name, dict(choice.settings), choice.folder) == (name, settings, folder)


@pytest.mark.parametrize("text", ["", ":lr=1", "lr=1", "mos:lr=1,lr=2"])
def test_choices_that_cannot_be_read(text: str) -> None:
    with pytest.raises(ConfigError, match="write NAME"):
        Choice.parse(text)


def test_every_combination_has_a_folder_and_a_command_of_its_own(tmp_path: Path) -> None:
    found = jobs(["mos", "mos:lr=0.5"], ["glyphs", "glyphs:20,tasks=5"], [0, 1], tmp_path)
    assert len({job.out for job in found}) == len(found) == 8
    assert [job.out.name for job in found][:3] == ["mos-glyphs-s0", "mos_lr=0.5-glyphs-s0", "mos-glyphs-s1"]
    last = found[-1]
    words = last.command(["lr=0.1", "train_epochs=2"])
    assert words == [
        *("run", "--strategy", "mos", "--benchmark", "glyphs:20", "--seed", "1", "--out", str(last.out)),
        *("--threads", "1", "--set", "train_epochs=2", "--set", "lr=0.5", "--set", "benchmark.tasks=5"),
    ], "its own lr wins over the one for all"
    last.out.mkdir()
    assert last.command(["lr=0.1"]) == ["resume", str(last.out), "--threads", "1"]


def test_the_settings_arrive_where_they_belong() -> None:
    experiment = resolve("mos", "glyphs:20", settings={"benchmark.tasks": 5, "lr": 0.5})
    assert (experiment.benchmark_config.tasks, experiment.benchmark_config.classes) == (5, 20)  # type: ignore[attr-defined]


def test_two_that_would_share_a_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="would both be written to"):
        jobs(["mos"], ["folder:a/b", "folder:a b"], [0], tmp_path)
    with pytest.raises(ConfigError, match="would both be written to"):
        jobs(["mos", "mos"], ["digits"], [0], tmp_path)


def test_the_full_table_has_every_strategy_of_the_package_once() -> None:
    found = known_strategies()
    assert sorted(found) == sorted(strategies.names())
    assert [name for name in found if name in table.ROWS] == list(table.ROWS)
    assert found[-1] == "joint", "a strategy without a place in that order comes before the upper bound"


def ran(*words: str) -> Result:
    return CliRunner().invoke(command_of(table.main, table.__doc__), words)


def test_a_small_table(tmp_path: Path) -> None:
    words = ["--strategies", "simple_cil", "--benchmarks", "glyphs:6,tasks=3,train_per_class=2"]
    done = ran(*words, "--seeds", "0", "--jobs", "1", "--out", str(tmp_path))
    assert done.exit_code == 0
    heading, _, line = done.stdout.strip().splitlines()
    assert heading.startswith("| benchmark | strategy |")
    assert line.startswith("| glyphs | simple_cil | 0 | 3 |")
    assert (tmp_path / "simple_cil-glyphs_6_tasks=3_train_per_class=2-s0" / "report.html").is_file()


def test_failed_runs_are_told_and_unreadable_words_end_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        assert "digits:0" in command
        return subprocess.CompletedProcess(command, 2, "", "error: digits takes no argument\n")

    monkeypatch.setattr("cl_adapters.benchmarks.bench.table.subprocess.run", fail)
    words = ["--strategies", "mos", "--seeds", "0", "--out", str(tmp_path)]
    done = ran(*words, "--benchmarks", "digits:0")
    assert done.exit_code == 1
    assert "mos-digits_0-s0: ['error: digits takes no argument']" in done.stderr
    done = ran(*words, "--benchmarks", ":")
    assert done.exit_code == 2
    assert "there is no name in front" in done.stderr


def test_an_option_takes_several_words_and_may_be_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def keep(*arguments: Any) -> bool:
        asked.append(arguments)
        return True

    monkeypatch.setattr(table, "run_all", keep)
    words = ["--seeds", "0", "1", "--strategies=mos", "lae", "--seeds", "2", "--set", "lr=-1", "blocks=[4,5]"]
    done = ran(*words, "--out", str(tmp_path))
    assert done.exit_code == 0, done.stderr
    ((todo, settings, _),) = asked
    assert [job.seed for job in todo] == [0, 0, 1, 1, 2, 2]
    assert {job.strategy.text for job in todo} == {"mos", "lae"}
    assert list(settings) == ["lr=-1", "blocks=[4,5]"]
