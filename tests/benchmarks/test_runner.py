"""Runs on disk: layout, resume, faults. A tiny random backbone and made-up pictures; no embedded weights needed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

from cl_adapters.benchmarks.results.results import read
from cl_adapters.benchmarks.run.evaluation import evaluate
from cl_adapters.benchmarks.run.experiment import Experiment, resolve
from cl_adapters.benchmarks.run.runner import latest_model, resume, run
from cl_adapters.benchmarks.run.session import complete_tasks
from cl_adapters.errors import ConfigError, IncompatibleBackbone, StorageError, TrainingDiverged
from cl_adapters.features import FeatureMemory


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


def test_a_run_begun_before_adapters_were_counted_can_be_resumed(photos: Path, weights: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    with pytest.raises(Stop):
        run(experiment(photos, weights), out, listener=StopAt(after=0))
    path = out / "tasks" / "000" / "row.json"
    old = json.loads(path.read_text(encoding="utf-8"))
    for key in ("adapters", "adapter_parameters", "adapters_per_block", "task_of_slot", "expansions", "sha256"):
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
