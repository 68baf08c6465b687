"""A run of instruction tuning becomes a pool, and the README's lines answer from it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cl_adapters import AdapterPool
from cl_adapters.benchmarks.cli.root import app
from cl_adapters.errors import PoolError

TASKS = {
    "mood": [("Text: the film was good Label:", "yes"), ("Text: a dull film Label:", "no")],
    "colour": [("the colour of sky", "blue"), ("the colour of fire", "red")],
}


@pytest.fixture
def run(tiny_decoder: Callable[[str], Path], tmp_path: Path) -> Callable[[str], Path]:
    """Folder of a finished run by one method."""
    (tmp_path / "tasks").mkdir()
    for name, rows in TASKS.items():
        choices = sorted(answer for _, answer in rows)
        lines = [json.dumps({"prompt": p, "answer": a, "choices": choices}) for p, a in rows]
        for split in ("train", "test"):
            (tmp_path / "tasks" / f"{name}.{split}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")

    def build(method: str) -> Path:
        words = ["instruct", "--model", f"hf:{tiny_decoder('llama')}", "--data", str(tmp_path / "tasks")]
        words += ["--method", method, "--out", str(tmp_path / method), "--set", "epochs=20", "--set", "lr=0.02"]
        words += ["--set", "batch=2", "--set", "adapter.targets=[query, value, up, down]", "--order", "mood,colour"]
        done = CliRunner().invoke(app, words)
        assert done.exit_code == 0, done.output
        return tmp_path / method

    return build


def test_the_language_model_of_the_readme(
    run: Callable[[str], Path], repo_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, ["pool", "create", "instruct-pool", "--run", str(run("retrieve"))])
    assert done.exit_code == 0, done.output
    records = AdapterPool.open("instruct-pool").records
    assert [[known.name for known in record.classes] for record in records] == [["mood"], ["colour"]]
    assert all(record.metrics["accuracy"] == 100 for record in records)
    (script,) = [
        part for part in (repo_root / "README.md").read_text().split("```") if "LanguageModel.from_pool" in part
    ]
    script = script.removeprefix("python\n").replace(
        '"Text: the battery died after a day\\nLabel:"', repr(TASKS["mood"][1][0])
    )
    script = script.replace('" good", " bad"', '"yes", "no"').replace("print(", "said = (")
    names: dict[str, object] = {}
    exec(script, names)
    assert names["said"] == (["mood"], ["no"], ["no"])


def test_a_sum_of_adapters_is_no_pool(run: Callable[[str], Path], tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["pool", "create", str(tmp_path / "pool"), "--run", str(run("o_lora"))])
    assert isinstance(done.exception, PoolError)
    assert not (tmp_path / "pool").exists()
