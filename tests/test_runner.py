"""Runs on disk: layout, resume, faults. A tiny random backbone and made-up pictures; no embedded weights needed."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

from cl_adapters.benchmarks.evaluation import evaluate
from cl_adapters.benchmarks.experiment import Experiment, resolve
from cl_adapters.benchmarks.results import BackboneInfo, read
from cl_adapters.benchmarks.rows import growth, to_results
from cl_adapters.benchmarks.runner import complete_tasks, latest_model, resume, run
from cl_adapters.errors import ConfigError, IncompatibleBackbone, StorageError, TrainingDiverged
from cl_adapters.features import FeatureMemory
from cl_adapters.strategies.expansion import Expansion


@pytest.fixture(scope="session")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights of timm's own tiny test model."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "test_vit.safetensors"
    save_file(
        {k: v.contiguous() for k, v in timm.create_model("test_vit", pretrained=False).state_dict().items()}, path
    )
    return path


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six classes of ten noisy pictures each."""
    root = tmp_path_factory.mktemp("photos")
    draw = np.random.default_rng(0)
    for label in range(6):
        folder = root / f"class{label}"
        folder.mkdir()
        base = draw.integers(0, 256, (16, 16, 3))
        for i in range(10):
            noisy = np.clip(base + draw.normal(0, 30, base.shape), 0, 255).astype(np.uint8)
            Image.fromarray(noisy).save(folder / f"{i}.png")
    return root


def experiment(photos: Path, weights: Path, strategy: str = "mos", **settings: Any) -> Experiment:
    quick = {} if strategy == "simple_cil" else {"train_epochs": 1, "train_mb_size": 16}
    if strategy == "mos":
        quick |= {"alignment.epochs": 2}
    return resolve(
        strategy,
        f"folder:{photos}",
        backbone="timm:test_vit",
        weights=str(weights),
        settings={"img_size": 32, "benchmark.tasks": 3, **quick, **settings},
    )


class Stop(Exception):
    """What a listener raises to interrupt a run."""


class StopAt:
    """Interrupts in the middle of task ``inside``, or right after task ``after`` was saved."""

    def __init__(self, inside: int = -1, after: int = -1) -> None:
        self.inside, self.after, self.task = inside, after, -1

    def task_started(self, task: int, tasks: int, names: list[str]) -> None:
        self.task = task

    def progress(self, phase: str, done: int, total: int) -> None:
        if self.task == self.inside:
            raise Stop

    def task_finished(self, results: Any) -> None:
        if self.task == self.after:
            raise Stop


def saved_tensors(out: Path) -> dict[str, bytes]:
    """Every tensor file of the last task, by name."""
    model = complete_tasks(out)[-1] / "model"
    return {str(path.relative_to(model)): path.read_bytes() for path in sorted(model.rglob("*.safetensors"))}


def test_a_run_leaves_results_report_and_a_model_that_answers(photos: Path, weights: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    results = run(experiment(photos, weights), out)
    assert read(out) == results
    assert results.num_tasks == 3
    assert results.accuracy_matrix[0][1] is None
    assert results.trainable_parameters[0] > 0
    assert (out / "report.html").read_text(encoding="utf-8").lstrip().lower().startswith("<!doctype html>")
    model = latest_model(out)
    files = sorted(photos.rglob("*.png"))[::7]
    answers = model.predict_files(files)
    assert [answer.file for answer in answers] == [str(file) for file in files]
    assert {answer.name for answer in answers} <= {f"class{i}" for i in range(6)}
    assert all(0 <= answer.score <= 1 for answer in answers)
    assert [path.name for path in complete_tasks(out)] == ["000", "001", "002"]


@pytest.mark.parametrize("strategy", ["mos", "sequential", "joint", "simple_cil"])
@pytest.mark.parametrize("stop", [StopAt(after=0), StopAt(inside=1)], ids=["between", "inside"])
def test_resume_equals_an_uninterrupted_run(
    photos: Path, weights: Path, tmp_path: Path, strategy: str, stop: StopAt
) -> None:
    if strategy == "simple_cil" and stop.inside >= 0:
        pytest.skip("SimpleCIL has no training phase to interrupt")
    chosen = experiment(photos, weights, strategy)
    whole = run(chosen, tmp_path / "whole")
    with pytest.raises(Stop):
        run(chosen, tmp_path / "broken", listener=stop)
    assert len(complete_tasks(tmp_path / "broken")) == 1
    assert not [path.name for path in (tmp_path / "broken" / "tasks").iterdir() if path.name.startswith(".")]
    resumed = resume(tmp_path / "broken")
    assert resumed.accuracy_matrix == whole.accuracy_matrix
    assert saved_tensors(tmp_path / "broken") == saved_tensors(tmp_path / "whole")


def test_adapters_are_counted_and_retrieval_shown_where_adapters_belong_to_tasks(
    photos: Path, weights: Path, tmp_path: Path
) -> None:
    mos = run(experiment(photos, weights), tmp_path / "mos")
    assert mos.routing is not None
    assert mos.routing.adapter_tasks == (0, 1, 2)
    assert mos.adapters == (1, 2, 3)
    bank = latest_model(tmp_path / "mos").bank
    assert bank is not None
    numbers = sum(parameter.numel() for parameter in bank.slot_parameters(0))
    assert mos.adapter_parameters == (numbers, 2 * numbers, 3 * numbers)
    assert mos.adapters_per_block == tuple({str(block): n for block in bank.blocks} for n in (1, 2, 3))
    assert mos.expansions is None, "one adapter per task is the rule, not for the data to decide"
    sequential = run(experiment(photos, weights, "sequential"), tmp_path / "sequential")
    assert sequential.routing is None
    assert sequential.adapters == (1, 1, 1)
    simple = run(experiment(photos, weights, "simple_cil"), tmp_path / "simple")
    assert (simple.routing, simple.adapters, simple.adapters_per_block) == (None, (0, 0, 0), ({}, {}, {}))


def test_what_the_data_asked_for_is_recorded_and_survives_a_resume(photos: Path, weights: Path, tmp_path: Path) -> None:
    chosen = experiment(photos, weights, "sema", threshold=0.01, last_blocks=2, descriptor_epochs=1)
    whole = run(chosen, tmp_path / "whole")
    assert whole.expansions
    assert whole.adapters_per_block is not None
    model = latest_model(tmp_path / "whole")
    assert [model.task_of_slot[entry.slot] for entry in whole.expansions] == [entry.task for entry in whole.expansions]
    assert all(entry.score is not None and entry.score > entry.threshold == 0.01 for entry in whole.expansions)
    assert model.num_slots == 1 + len(whole.expansions)
    for entry in whole.expansions:
        block = str(entry.block)
        before, after = (whole.adapters_per_block[task][block] for task in (entry.task - 1, entry.task))
        assert after == before + 1, "at most one per block and task"
    assert whole.routing is None
    assert "Where it grew" in (tmp_path / "whole" / "report.html").read_text(encoding="utf-8")
    with pytest.raises(Stop):
        run(chosen, tmp_path / "broken", listener=StopAt(after=1))
    assert resume(tmp_path / "broken").expansions == whole.expansions


def row(counts: list[list[int]], **more: Any) -> dict[str, Any]:
    """A row of one task, as far as ``to_results`` needs it."""
    seconds = dict.fromkeys(("train", "statistics", "alignment", "eval"), 1.0)
    return {
        "accuracy": [50.0] * len(counts), "routing": counts, "passes": 1.0, "trainable_parameters": 1,
        "stored_bytes": 1, "seconds": seconds, "cpu_seconds": seconds, "started": "", "finished": "", **more,
    }  # fmt: skip


def test_the_right_adapter_is_one_made_in_the_images_task(photos: Path, weights: Path) -> None:
    """Two adapters of task 0, then one of task 1; the first column of the counts is the bare backbone."""
    chosen = experiment(photos, weights)
    data = chosen.benchmark_config.load(0)
    recorded = {"experiment": chosen.to_plain(), "versions": {}, "hardware": {}}
    first = row([[1, 4, 5]], task_of_slot=[0, 0])
    second = row([[0, 6, 3, 1], [0, 0, 4, 6]], task_of_slot=[0, 0, 1])
    results = to_results([first, second], chosen, data, BackboneInfo(name="x", fingerprint="y"), recorded)
    assert results.routing is not None
    assert results.routing.adapter_tasks == (0, 0, 1)
    assert results.routing.counts == ((6, 3, 1), (0, 4, 6))
    assert results.routing.right_share == (90.0, 75.0)
    assert results.adapters is None, "these rows do not tell"


def test_an_adapter_counts_once_per_block_and_an_endless_score_is_null() -> None:
    """Two sites in block 3, one in block 5; the second adapter is at block 5 only."""
    keys = {0: ["b3.key/a", "b3.key/b", "b3.value/a", "b5.key/a"], 1: ["b5.key/a"]}
    sites = [SimpleNamespace(name=name, block=int(name[1])) for name in ("b3.key", "b3.value", "b5.key")]
    bank = SimpleNamespace(
        sites=sites, blocks=(3, 5), num_slots=2, parameters=lambda: [torch.zeros(2, 4), torch.zeros(5)],
        named_slot=lambda slot: [(key, None) for key in keys[slot]],
    )  # fmt: skip
    model = SimpleNamespace(bank=bank, num_slots=2, task_of_slot=[0, 1])
    added = Expansion(task=1, block=5, slot=1, score=float("inf"), threshold=2.0, scan=0, batch=0)
    found = growth(SimpleNamespace(model=model, expansions=[added]))  # type: ignore[arg-type]
    assert found["adapters_per_block"] == {"3": 1, "5": 2}
    assert (found["adapters"], found["adapter_parameters"]) == (2, 13)
    assert found["expansions"] == [
        {"task": 1, "block": 5, "slot": 1, "score": None, "threshold": 2.0, "scan": 0, "batch": 0}
    ]


def test_a_run_begun_before_adapters_were_counted_can_be_resumed(photos: Path, weights: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    with pytest.raises(Stop):
        run(experiment(photos, weights), out, listener=StopAt(after=0))
    path = out / "tasks" / "000" / "row.json"
    old = json.loads(path.read_text(encoding="utf-8"))
    for key in ("adapters", "adapter_parameters", "adapters_per_block", "task_of_slot", "expansions"):
        del old[key]
    path.write_text(json.dumps(old), encoding="utf-8")
    results = resume(out)
    assert (results.adapters, results.expansions) == (None, None)
    assert results.routing is not None
    assert read(out) == results


def test_resuming_a_finished_run_changes_nothing(photos: Path, weights: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    results = run(experiment(photos, weights, "simple_cil"), out)
    before = (out / "results.json").read_bytes()
    assert resume(out) == results
    assert (out / "results.json").read_bytes() == before


def test_an_existing_run_folder_is_never_touched(photos: Path, weights: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    out.mkdir()
    (out / "precious").write_text("x", encoding="utf-8")
    with pytest.raises(StorageError, match=r"exists already.*resume"):
        run(experiment(photos, weights), out)
    assert [path.name for path in out.iterdir()] == ["precious"]


def test_an_output_that_cannot_be_written_is_one_clear_error(photos: Path, weights: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x", encoding="utf-8")
    with pytest.raises(StorageError, match="cannot write"):
        run(experiment(photos, weights), tmp_path / "file" / "run")


def test_a_diverging_run_stops_with_one_error_and_keeps_what_was_saved(
    photos: Path, weights: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    with pytest.raises(TrainingDiverged, match=r"the loss became .* in task 0 .*lower lr"):
        run(experiment(photos, weights, lr=1e30, train_epochs=3), out)
    assert not complete_tasks(out)
    assert not list((out / "tasks").iterdir())


def test_a_backbone_without_sites_is_found_before_anything_is_written(photos: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    state = timm.create_model("test_resnet", pretrained=False).state_dict()
    save_file({key: value.contiguous() for key, value in state.items()}, tmp_path / "w.safetensors")
    chosen = resolve(
        "mos", f"folder:{photos}", backbone="timm:test_resnet", weights=str(tmp_path / "w.safetensors"), settings={}
    )
    with pytest.raises(IncompatibleBackbone, match="no known adapter sites in ResNet"):
        run(chosen, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_resume_with_other_data_names_what_differs(photos: Path, weights: Path, tmp_path: Path) -> None:
    copy = tmp_path / "photos"
    for path in photos.rglob("*.png"):
        target = copy / path.relative_to(photos)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    out = tmp_path / "run"
    with pytest.raises(Stop):
        run(experiment(copy, weights), out, listener=StopAt(after=0))
    Image.new("RGB", (16, 16)).save(copy / "class0" / "0.png")
    with pytest.raises(ConfigError, match="data_fingerprint"):
        resume(out)
    assert len(complete_tasks(out)) == 1


def test_resume_where_there_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"config.json is missing"):
        resume(tmp_path / "nowhere")


def test_an_altered_checkpoint_is_refused_and_left_alone(photos: Path, weights: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    with pytest.raises(Stop):
        run(experiment(photos, weights), out, listener=StopAt(after=0))
    heads = out / "tasks" / "000" / "model" / "heads.safetensors"
    content = bytearray(heads.read_bytes())
    content[-1] ^= 1
    heads.write_bytes(content)
    with pytest.raises(StorageError, match=r"heads.safetensors was altered"):
        resume(out)
    assert heads.read_bytes() == bytes(content)


def test_remembered_features_give_the_same_evaluation_with_fewer_passes(
    photos: Path, weights: Path, tmp_path: Path
) -> None:
    chosen = experiment(photos, weights, train_epochs=2)
    run(chosen, tmp_path / "run")
    model = latest_model(tmp_path / "run")
    data = chosen.benchmark_config.load(0)
    assert model.backbone.preprocessing is not None
    transform = model.backbone.preprocessing.eval_transform()
    plain = evaluate(model, data, [0, 1, 2], transform)
    memory = FeatureMemory(model)
    first = evaluate(model, data, [0, 1, 2], transform, memory=memory)
    second = evaluate(model, data, [0, 1, 2], transform, memory=memory)
    assert (plain.accuracy, plain.routing, plain.passes) == (first.accuracy, first.routing, first.passes)
    assert (second.accuracy, second.passes) == (first.accuracy, first.passes)
    assert first.computed == plain.computed == plain.passes
    assert second.computed == 0


def test_config_json_rebuilds_the_experiment(photos: Path, weights: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"adapter.bottleneck": 4, "merge": "released"}
    chosen = experiment(photos, weights, **settings)
    plain = json.loads(json.dumps(chosen.to_plain()))
    assert Experiment.from_plain(plain) == chosen
