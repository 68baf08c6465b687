"""Running an experiment in class-incremental learning: ``results.json`` after every task, ``report.html`` at the end.

The folder and the order of events are those of :mod:`cl_adapters.benchmarks.run.session`.
"""

from __future__ import annotations

import dataclasses
import datetime
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cl_adapters.benchmarks.report.report import write_report
from cl_adapters.benchmarks.results.results import FILE_NAME, BackboneInfo, Results, write
from cl_adapters.benchmarks.run.evaluation import evaluate
from cl_adapters.benchmarks.run.experiment import Experiment, data_fingerprint
from cl_adapters.benchmarks.run.rows import TaskRow, growth, to_results
from cl_adapters.benchmarks.run.session import (
    Listener,
    Progress,
    Row,
    changed_inputs,
    continue_run,
    describe,
    latest_model,
    read_from,
    read_recorded,
    recorded_threads,
    refuse_taken,
    start,
)
from cl_adapters.benchmarks.streams.avalanche import to_avalanche
from cl_adapters.benchmarks.streams.prepared import prepare
from cl_adapters.errors import ConfigError, StorageError
from cl_adapters.features import FeatureMemory
from cl_adapters.model.facade import AdapterModel
from cl_adapters.model.files import stored_bytes

__all__ = ["Listener", "latest_model", "resume", "run"]

PARTS = ("train", "statistics", "alignment", "eval")


def run(
    experiment: Experiment, out: Path, *, device: str = "cpu", listener: Listener[Results] | None = None
) -> Results:
    """Run an experiment in the new folder ``out``.

    Raises:
        StorageError: ``out`` exists or cannot be written.
    """
    refuse_taken(out, f"resume it with `cl-adapters resume {out}`")
    return start(_Runner(experiment, device), out, listener)


def resume(
    out: Path, *, device: str = "cpu", threads: int | None = None, listener: Listener[Results] | None = None
) -> Results:
    """Go on after the last complete task of the run in ``out``; a finished run is left as it is.

    Args:
        out: folder of the run.
        device: where to compute.
        threads: of the CPU; default those of the run. With others the bits may differ, which is warned of.
        listener: called as tasks begin, progress and end.

    Raises:
        StorageError: no run there, an altered or incomplete one, or one that another process is writing.
        ConfigError: backbone or data are not those of the run; names the keys that differ.
    """
    recorded = read_recorded(out)
    if recorded.get("experiment") is None:
        raise StorageError(f"{out} is no run of a strategy; if it is one of `instruct`, go on with `--resume` there")
    with read_from(out / "config.json"):
        experiment = Experiment.from_plain(recorded["experiment"])
    with recorded_threads(recorded, threads):
        runner = _Runner(experiment, device)
        differing = changed_inputs(recorded, runner.description)
        if differing:
            pairs = "; ".join(f"{key}: recorded {then}, now {now}" for key, then, now in differing)
            raise ConfigError(f"this run cannot be resumed, its inputs changed: {pairs}")
        return continue_run(runner, out, listener, recorded)


class _Runner:
    """The :class:`TaskRunner` of a strategy on a benchmark."""

    row_type = TaskRow

    def __init__(self, experiment: Experiment, device: str) -> None:
        self.experiment = experiment
        self.device = device
        self.backbone = experiment.backbone.load()
        self.inputs = prepare(experiment.benchmark_config.load(experiment.seed), self.backbone)
        self.data = self.inputs.data
        self.tasks: Sequence[Sequence[str]] = [
            [self.data.classes[label] for label in labels] for labels in self.data.tasks
        ]
        packages = ["torch", "torchvision", "timm", "avalanche-lib", "numpy", "safetensors"]
        if self.data.modality == "text":
            packages += ["transformers", "tokenizers"]
        plain = {"experiment": experiment.to_plain()}
        self.description = describe(plain, self.backbone.fingerprint, data_fingerprint(self.data), packages, device)

    @property
    def model(self) -> AdapterModel:
        """The strategy's."""
        model: AdapterModel = self.strategy.model
        return model

    def restore(self, done: Sequence[Path], progress: Progress | None) -> None:
        """Build the strategy, on the model of the last complete task if there is one."""
        model: Any = self.backbone
        if done:
            model = AdapterModel.load(done[-1] / "model", self.backbone, self.device)
        self.strategy = self.experiment.strategy_class(
            model=model,
            config=self.experiment.strategy_config,
            seed=self.experiment.seed,
            device=self.device,
            evaluator=None,
            class_names=dict(enumerate(self.data.classes)),
            progress=progress,
            keys=self.experiment.keys,
            predictor=self.experiment.predictor,
        )
        self.stream = to_avalanche(*self.inputs).train_stream
        self.strategy.recall([self.stream[task] for task in range(len(done))])
        self.memory = FeatureMemory(self.strategy.model) if self.strategy.frozen_after_task else None

    def run_task(self, task: int, rows: Sequence[Row]) -> Row:
        """Train on a task's samples, then evaluate on the test samples of all tasks so far."""
        strategy = self.strategy
        wall, cpu = strategy.timings.wall, strategy.timings.cpu
        started = _now()
        before = {part: (wall.get(part, 0.0), cpu.get(part, 0.0)) for part in PARTS}
        strategy.train(self.stream[task])
        with strategy.timings.part("eval"):
            found = evaluate(
                strategy.model,
                self.data,
                list(range(task + 1)),
                self.inputs.eval_transform,
                batch_size=strategy.config.eval_mb_size,
                memory=self.memory,
            )
        return {
            **dataclasses.asdict(found),
            **growth(strategy),
            "trainable_parameters": strategy.trainable_parameters,
            "stored_bytes": stored_bytes(strategy.model) - sum(row["stored_bytes"] for row in rows),
            "seconds": {part: wall.get(part, 0.0) - before[part][0] for part in PARTS},
            "cpu_seconds": {part: cpu.get(part, 0.0) - before[part][1] for part in PARTS},
            "started": started,
            "finished": _now(),
        }

    def save(self, rows: Sequence[Row], out: Path) -> Results:
        """Write ``results.json``."""
        backbone = BackboneInfo(name=self.backbone.name, fingerprint=self.backbone.fingerprint)
        results = to_results(rows, self.experiment, self.data, backbone, self.description)
        write(results, out / FILE_NAME)
        return results

    def finish(self, results: Results, out: Path) -> None:
        """Write the report."""
        write_report(results, out / "report.html")


def _now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
