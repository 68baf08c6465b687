"""Continual instruction tuning: methods, data, resuming, the command."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from cl_adapters.adapters.bottleneck import Bottleneck
from cl_adapters.adapters.lora import LoRA
from cl_adapters.bank.routes import Route
from cl_adapters.benchmarks.base import BenchmarkData, TextSet
from cl_adapters.benchmarks.cli.root import app
from cl_adapters.benchmarks.data._instructions import from_benchmark, read_folder, read_tasks, tasks_fingerprint
from cl_adapters.benchmarks.results.instruct import InstructResults, read
from cl_adapters.benchmarks.run import instruct
from cl_adapters.errors import ClAdaptersError, ConfigError, DataError, StorageError, TrainingDiverged, UnknownName
from cl_adapters.language.model import LanguageModel
from cl_adapters.strategies._loop.order import length_batches
from cl_adapters.strategies.instruct import Example, InstructTask, instruct_methods
from cl_adapters.strategies.instruct.base import WINDOW
from cl_adapters.strategies.instruct.o_lora import OLoRAConfig

Rows = Sequence[tuple[str, str]]

MOOD = [("the film was good", "yes"), ("the film was great", "yes"), ("the film was bad", "no"), ("a dull film", "no")]
COLOUR = [("the colour of sky", "blue"), ("the colour of grass", "green"), ("the colour of fire", "red")]
NUMBERS = [("count one two", "three"), ("count two three", "four"), ("count before two", "one")]
TASKS: dict[str, Rows] = {"mood": MOOD, "colour": COLOUR, "numbers": NUMBERS}
SETTINGS: dict[str, Any] = {"epochs": 20, "batch": 2, "lr": 0.02, "adapter.targets": ["query", "value", "up", "down"]}


def write_task(folder: Path, name: str, rows: Rows, *, choices: bool = True) -> None:
    folder.mkdir(exist_ok=True)
    labels = sorted({answer for _, answer in rows})
    lines = [json.dumps({"prompt": p, "answer": a} | ({"choices": labels} if choices else {})) for p, a in rows]
    for split in ("train", "test"):
        (folder / f"{name}.{split}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, rows in TASKS.items():
        write_task(tmp_path / "tasks", name, rows, choices=name != "numbers")
    (tmp_path / "tasks" / "order.txt").write_text("mood\ncolour\n\nnumbers\n")
    return tmp_path / "tasks"


@pytest.fixture
def experiment(tiny_decoder: Callable[[str], Path], folder: Path) -> Callable[..., instruct.InstructExperiment]:
    def build(method: str, **settings: Any) -> instruct.InstructExperiment:
        return instruct.InstructExperiment(
            method=method,
            model=f"hf:{tiny_decoder('llama')}",
            data=str(folder),
            order=("mood", "colour"),
            settings=SETTINGS | settings,
        )

    return build


def figures(results: InstructResults) -> Any:
    """What does not depend on the clock."""
    return (results.likelihood, results.generation, results.train_loss, results.trainable_parameters)


# --- methods ---------------------------------------------------------------------------------------------------------


def test_retrieve_learns_and_forgets_nothing(
    experiment: Callable[..., instruct.InstructExperiment], tmp_path: Path
) -> None:
    results = instruct.run(experiment("retrieve"), tmp_path / "run")
    assert results.tasks == ("mood", "colour") and results.train_counts == (4, 3)
    assert results.generation.accuracy_matrix == ((100.0, None), (100.0, 100.0))
    assert results.likelihood is not None and results.likelihood.accuracy_matrix == ((100.0, None), (100.0, 100.0))
    assert results.generation.a_bar == 100 and results.generation.forgetting == 0
    assert max(results.train_loss) < 0.3, "from about 3.5"
    assert read(tmp_path / "run") == results
    whole = json.loads((tmp_path / "run" / "instruct.json").read_text())
    for change in ("tasks", "train_counts", "seconds_eval"):
        (tmp_path / "instruct.json").write_text(json.dumps(whole | {change: whole[change][:1]}))
        with pytest.raises(StorageError, match=r"expected one for each of [12] finished tasks"):
            read(tmp_path / "instruct.json")
    for depth in (400, 150):
        (tmp_path / "instruct.json").write_text(
            json.dumps(whole | {"tasks": 0}).replace('"tasks": 0', '"tasks": ' + "[" * depth + "]" * depth)
        )
        with pytest.raises(StorageError, match=r"instruct\.json.*tasks.*nested more than 100 deep"):
            read(tmp_path / "instruct.json")


def test_sequential_forgets(experiment: Callable[..., instruct.InstructExperiment], tmp_path: Path) -> None:
    results = instruct.run(experiment("sequential"), tmp_path / "run")
    matrix = results.generation.accuracy_matrix
    assert matrix[0][0] == matrix[1][1] == 100
    assert results.generation.forgetting is not None and results.generation.forgetting > 0
    assert results.generation.backward_transfer == -results.generation.forgetting
    assert results.trainable_parameters[0] == results.trainable_parameters[1]


def test_o_lora_is_orthogonal_and_leaves_old_adapters_alone(tiny_decoder: Callable[[str], Path]) -> None:
    adapter = LoRA(rank=4, targets=("query", "value"))
    overlaps = []
    for weight in (0.0, 5.0):
        config = OLoRAConfig(adapter=adapter, epochs=10, batch=2, lr=0.02, orthogonality=weight)
        method = instruct_methods.get("o_lora")(
            LanguageModel.load(f"hf:{tiny_decoder('gpt2')}", adapter=adapter), config
        )
        method.learn(task_of("mood"))
        assert method.penalty() is None, "nothing to be orthogonal to"
        before = method.language.bank.export(0)
        method.learn(task_of("colour"))
        after, new = method.language.bank.export(0), method.language.bank.export(1)
        assert all(torch.equal(before[key], after[key]) for key in before)
        overlaps.append(sum(float((new[key] @ before[key].T).abs().sum()) for key in new if key.endswith("/A")))
        penalty = method.penalty()
        assert (penalty is None) if weight == 0 else float(penalty) == pytest.approx(5 * overlaps[1], rel=1e-5)  # type: ignore[arg-type]
        if weight:
            assert_summed(method.language, method.routes(["the colour of sky", "a"]))
    assert overlaps[1] < overlaps[0] / 3


def assert_summed(language: LanguageModel, routes: Any) -> None:
    """The sum of two LoRAs is the LoRA of their tensors, one below the other."""
    prompts, answers = ["the colour of sky", "a"], ["blue", "no"]
    both = [language.bank.export(slot) for slot in range(2)]
    wide = LoRA(rank=8, targets=("query", "value"))
    other = LanguageModel.load(str(language.model.backbone.source["name"]), adapter=wide)
    stacked = {key: torch.cat([one[key] for one in both], dim=int(key.endswith("/B"))) for key in both[0]}
    other.bank.add_slot(stacked)
    ours = language.log_likelihood(prompts, answers, routes)
    assert torch.allclose(ours, other.log_likelihood(prompts, answers, Route.single(0)), atol=1e-5)


def task_of(name: str) -> InstructTask:
    examples = tuple(Example(prompt=prompt, answer=answer) for prompt, answer in TASKS[name])
    return InstructTask(name=name, train=examples, test=examples)


def test_the_loss_counts_answers_only(tiny_decoder: Callable[[str], Path]) -> None:
    """A prompt that is unlikely under the model changes nothing but what it says of the answer."""
    language = LanguageModel.load(f"hf:{tiny_decoder('gpt2')}")
    pairs = language.tokens.pairs(["the film was good", "a"], ["yes", "no"], end=True)
    loss = language.loss(["the film was good", "a"], ["yes", "no"])
    ended = language.log_likelihood(["the film was good", "a"], ["yes", "no"], end=True)
    assert float(loss) == pytest.approx(-float(ended.sum()) / sum(len(answer) for _, answer in pairs), abs=1e-5)


def test_batches_are_of_similar_length() -> None:
    lengths = torch.tensor([3, 50, 4, 51, 5, 52, 6])
    order = torch.Generator().manual_seed(0)
    batches = [rows.tolist() for rows in length_batches(lengths, 2, order, window=WINDOW)]
    assert sorted(row for rows in batches for row in rows) == list(range(7))
    assert sorted(map(len, batches)) == [1, 2, 2, 2]
    assert sum(int(lengths[rows].max() - lengths[rows].min()) for rows in batches) < 50
    assert batches != [rows.tolist() for rows in length_batches(lengths, 2, order, window=WINDOW)]


def test_bad_methods(tiny_decoder: Callable[[str], Path]) -> None:
    place = f"hf:{tiny_decoder('llama')}"
    with pytest.raises(ConfigError, match="down-projection"):
        instruct_methods.get("o_lora")(LanguageModel.load(place, adapter=Bottleneck()), OLoRAConfig())
    with pytest.raises(ClAdaptersError, match="no adapters"):
        instruct_methods.get("retrieve")(LanguageModel.load(place), OLoRAConfig())
    cls = instruct_methods.get("sequential")
    config = cls.Config(adapter=LoRA(), lr=3e38, epochs=4, batch=2, max_norm=None, optimizer="sgd")
    with pytest.raises(TrainingDiverged, match="smaller lr"):
        cls(LanguageModel.load(place, adapter=LoRA()), config).learn(task_of("mood"))
    with pytest.raises(ValueError, match="epochs"):
        OLoRAConfig(epochs=0)


# --- data ------------------------------------------------------------------------------------------------------------


def test_folder_and_order(folder: Path) -> None:
    assert [task.name for task in read_folder(folder)] == ["mood", "colour", "numbers"]
    assert [task.name for task in read_tasks(f"instruct:{folder}", ["numbers", "mood"])] == ["numbers", "mood"]
    first, _, last = read_folder(folder)
    assert first.train[0] == Example(prompt="the film was good", answer="yes", choices=("no", "yes"))
    assert first.has_choices and not last.has_choices
    (folder / "order.txt").unlink()
    assert [task.name for task in read_folder(folder)] == ["colour", "mood", "numbers"]
    with pytest.raises(UnknownName, match="did you mean 'mood'"):
        read_tasks(str(folder), ["mod"])
    with pytest.raises(DataError, match="named twice"):
        read_tasks(str(folder), ["mood", "mood"])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "a"}', "line 2: 'answer' must be a text"),
        ('{"prompt": "a", "answer": 3}', "line 2: 'answer' must be a text, got 3"),
        ('{"prompt": " ", "answer": "b"}', "line 2: prompt and answer must not be empty"),
        ('{"prompt": "a", "answer": "b", "choices": ["c"]}', r"line 2: the answer 'b' is none of the choices \['c'\]"),
        ('{"prompt": "a", "answer": "b", "choices": "b"}', "line 2: 'choices' must be a list"),
        ('{"prompt": "a", "answer": "b", "label": "b"}', "line 2: unknown key 'label'"),
        ("{", "line 2: not JSON"),
    ],
)
def test_bad_lines_are_named(folder: Path, line: str, message: str) -> None:
    path = folder / "mood.test.jsonl"
    path.write_text(f'{{"prompt": "a", "answer": "b"}}\n{line}\n', encoding="utf-8")
    with pytest.raises(DataError, match=rf"mood\.test\.jsonl, {message}"):
        read_folder(folder)


def test_bad_folders(folder: Path, tmp_path: Path) -> None:
    (folder / "mood.test.jsonl").unlink()
    with pytest.raises(DataError, match="'mood' has a train file only"):
        read_folder(folder)
    with pytest.raises(DataError, match="no folder"):
        read_tasks(f"instruct:{tmp_path / 'absent'}")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="has no tasks"):
        read_folder(tmp_path / "empty")


def test_labelled_texts_become_prompts() -> None:
    labels = np.array([0, 1, 2, 1])
    texts = TextSet(["a sky", "a fire", "a film {text}", "night"], labels)
    data = BenchmarkData(
        name="things",
        classes=("up", "hot", "seen"),
        class_order=(2, 0, 1),
        task_sizes=(1, 2),
        licence="",
        train=texts,
        test=texts,
    )
    first, second = from_benchmark(data)
    assert (first.name, second.name) == ("things-0", "things-1")
    assert first.train == (Example(prompt="Text: a film {text}\nLabel:", answer=" seen", choices=(" seen",)),)
    assert [example.answer for example in second.test] == [" up", " hot", " hot"]
    assert second.train[0].choices == (" up", " hot")
    assert tasks_fingerprint([first, second]) != tasks_fingerprint([second, first])


# --- runs ------------------------------------------------------------------------------------------------------------


class Killed(BaseException):
    pass


class KillAfter:
    """Dies within the task after ``tasks`` complete ones."""

    def __init__(self, tasks: int) -> None:
        self.left = tasks

    def task_started(self, task: int, tasks: int, names: list[str]) -> None: ...

    def progress(self, phase: str, done: int, total: int) -> None:
        if self.left == 0:
            raise Killed

    def task_finished(self, results: InstructResults) -> None:
        self.left -= 1


@pytest.mark.parametrize("method", instruct_methods.names())
def test_a_killed_run_goes_on(
    method: str, experiment: Callable[..., instruct.InstructExperiment], tmp_path: Path
) -> None:
    chosen = experiment(method, epochs=3)
    whole = instruct.run(chosen, tmp_path / "whole")
    with pytest.raises(Killed):
        instruct.run(chosen, tmp_path / "killed", listener=KillAfter(1))
    assert sorted(path.name for path in (tmp_path / "killed" / "tasks").iterdir()) == ["000"]
    assert read(tmp_path / "killed").tasks == ("mood",)
    assert figures(instruct.resume(tmp_path / "killed")) == figures(whole)
    files = [tmp_path / name / "tasks" / "001" / "model" for name in ("whole", "killed")]
    names = sorted(path.relative_to(files[0]) for path in files[0].rglob("*.safetensors"))
    assert names and all((files[0] / name).read_bytes() == (files[1] / name).read_bytes() for name in names)
    stamp = (tmp_path / "killed" / "tasks" / "001" / "row.json").stat().st_mtime_ns
    assert figures(instruct.resume(tmp_path / "killed")) == figures(whole), "a finished run is left as it is"
    assert (tmp_path / "killed" / "tasks" / "001" / "row.json").stat().st_mtime_ns == stamp


def test_what_cannot_be_resumed(
    experiment: Callable[..., instruct.InstructExperiment], folder: Path, tmp_path: Path
) -> None:
    instruct.run(experiment("sequential", epochs=1), tmp_path / "run")
    with pytest.raises(StorageError, match="exists already"):
        instruct.run(experiment("sequential"), tmp_path / "run")
    write_task(folder, "colour", COLOUR[:2])
    with pytest.raises(ConfigError, match="data_fingerprint"):
        instruct.resume(tmp_path / "run")
    plain = json.loads((tmp_path / "run" / "instruct.json").read_text())
    plain["generation"]["a_last"] = 12.5
    (tmp_path / "run" / "instruct.json").write_text(json.dumps(plain))
    with pytest.raises(StorageError, match=r"altered: generation\.a_last"):
        read(tmp_path / "run")


def test_bad_settings_come_before_anything_is_loaded(
    experiment: Callable[..., instruct.InstructExperiment], tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="did you mean 'epochs'"):
        instruct.run(experiment("o_lora", epoch=3), tmp_path / "run")
    with pytest.raises(UnknownName, match="did you mean 'o_lora'"):
        instruct.run(experiment("olora"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_command(tiny_decoder: Callable[[str], Path], folder: Path, tmp_path: Path) -> None:
    options = ["--model", f"hf:{tiny_decoder('gpt2')}", "--data", str(folder), "--order", "numbers,mood"]
    settings = ["--set", "epochs=1", "--set", "adapter.rank=2", "--set", "max_length=32", "--set", "optimizer=sgd"]
    out = tmp_path / "run"
    said = CliRunner().invoke(app, ["instruct", *options, "--method", "o_lora", "--out", str(out), *settings])
    assert said.exit_code == 0, said.output
    assert "by likelihood" in said.output and "by generation" in said.output and "BWT" in said.output
    results = read(out)
    assert results.method == "o_lora" and results.tasks == ("numbers", "mood")
    assert results.likelihood is not None, "the second task has label strings"
    assert results.likelihood.accuracy_matrix[1][0] is None and results.likelihood.a_bar is None
    assert results.config["settings"]["adapter"]["rank"] == 2 and results.config["max_length"] == 32
    shutil.rmtree(out / "tasks" / "001")
    again = CliRunner().invoke(app, ["instruct", "--resume", str(out)])
    assert again.exit_code == 0, again.output
    assert figures(read(out)) == figures(results)
    refused = CliRunner().invoke(app, ["instruct", "--resume", str(out), "--data", str(folder)])
    assert isinstance(refused.exception, ConfigError)
