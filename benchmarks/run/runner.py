"""Running an experiment task by task, with a checkpoint after each that is whole or not there.

    runs/NAME/config.json      resolved experiment, versions, hardware, fingerprints of backbone and data
    runs/NAME/tasks/000/       model/ (AdapterModel) and row.json (what was measured), renamed in place when complete
    runs/NAME/results.json     after every task
    runs/NAME/report.html      at the end

Nothing random has to be stored: every task's randomness is derived from (seed, task), so a resumed run gives the
numbers of an uninterrupted one.
"""

from __future__ import annotations

import dataclasses
import datetime
import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import torch

from cl_adapters._io import new_folder, read_json, write_json
from cl_adapters._version import __version__
from cl_adapters.benchmarks.report.report import write_report
from cl_adapters.benchmarks.results.results import BackboneInfo, Results, write
from cl_adapters.benchmarks.run.evaluation import evaluate
from cl_adapters.benchmarks.run.experiment import Experiment, data_fingerprint
from cl_adapters.benchmarks.run.rows import growth, to_results
from cl_adapters.benchmarks.run.run_folder import complete_tasks, exclusive
from cl_adapters.benchmarks.streams.avalanche import to_avalanche
from cl_adapters.benchmarks.streams.prepared import prepare
from cl_adapters.errors import ConfigError, StorageError
from cl_adapters.features import FeatureMemory
from cl_adapters.model.facade import AdapterModel
from cl_adapters.model.files import moved_backbone, save_model, stored_bytes
from cl_adapters.strategies.base import AdapterStrategy

SCHEMA = 1
PARTS = ("train", "statistics", "alignment", "eval")


class Listener(Protocol):
    """Who is told how a run goes."""

    def task_started(self, task: int, tasks: int, names: list[str]) -> None:
        """A task begins."""

    def progress(self, phase: str, done: int, total: int) -> None:
        """Within a task."""

    def task_finished(self, results: Results) -> None:
        """A task is saved; ``results`` covers all tasks so far."""


def run(experiment: Experiment, out: Path, *, device: str = "cpu", listener: Listener | None = None) -> Results:
    """Run an experiment in the new folder ``out``.

    Raises:
        StorageError: ``out`` exists or cannot be written.
    """
    if out.exists():
        raise StorageError(f"{out} exists already: resume it with `cl-adapters resume {out}`, or choose another --out")
    session = _Session(experiment, out, device, listener)
    strategy = session.strategy([])  # a backbone that does not fit is found before anything is written
    with new_folder(out) as folder:
        (folder / "tasks").mkdir()
        write_json(folder / "config.json", session.description)
    return session.go(strategy)


def resume(out: Path, *, device: str = "cpu", listener: Listener | None = None) -> Results:
    """Go on after the last complete task of the run in ``out``; a finished run is left as it is.

    Raises:
        StorageError: no run there, or one that another process is writing.
        ConfigError: backbone or data are not those of the run; names the keys that differ.
    """
    recorded = read_json(out / "config.json", schema_version=SCHEMA)
    session = _Session(Experiment.from_plain(recorded["experiment"]), out, device, listener)
    differing = [
        key for key in ("backbone_fingerprint", "data_fingerprint") if recorded[key] != session.description[key]
    ]
    if differing:
        pairs = "; ".join(f"{key}: recorded {recorded[key]}, now {session.description[key]}" for key in differing)
        raise ConfigError(f"this run cannot be resumed, its inputs changed: {pairs}")
    session.description = recorded
    return session.go()


def latest_model(out: Path, weights: Path | None = None) -> AdapterModel:
    """The model after the last complete task of a run.

    Args:
        out: folder of the run.
        weights: of the backbone, where its file or folder has moved.

    Raises:
        StorageError: no run there, or no task is complete.
    """
    read_json(out / "config.json", schema_version=SCHEMA)
    done = complete_tasks(out)
    if not done:
        raise StorageError(f"{out} has no complete task yet; go on with `cl-adapters resume {out}`")
    model = done[-1] / "model"
    return AdapterModel.load(model, None if weights is None else moved_backbone(model, weights))


class _Session:
    """One process working on one run folder."""

    def __init__(self, experiment: Experiment, out: Path, device: str, listener: Listener | None) -> None:
        self.experiment = experiment
        self.out = out
        self.device = device
        self.listener = listener
        self.backbone = experiment.backbone.load()
        self.inputs = prepare(experiment.benchmark_config.load(experiment.seed), self.backbone)
        self.data = self.inputs.data
        self.description = self._describe()

    def go(self, strategy: AdapterStrategy | None = None) -> Results:
        """Train and evaluate the tasks that are not complete, then write the report."""
        with exclusive(self.out):
            done = complete_tasks(self.out)
            results = self._results([read_json(path / "row.json", schema_version=SCHEMA) for path in done])
            if len(done) < len(self.data.tasks):
                results = self._learn(strategy or self.strategy(done), done)
            assert results is not None
            write(results, self.out / "results.json")
            write_report(results, self.out / "report.html")
        return results

    def _learn(self, strategy: AdapterStrategy, done: list[Path]) -> Results:
        rows = [read_json(path / "row.json", schema_version=SCHEMA) for path in done]
        stream = to_avalanche(*self.inputs).train_stream
        strategy.recall([stream[task] for task in range(len(done))])
        memory = FeatureMemory(strategy.model) if strategy.frozen_after_task else None
        results: Results | None = None
        for task in range(len(done), len(self.data.tasks)):
            if self.listener is not None:
                names = [self.data.classes[label] for label in self.data.tasks[task]]
                self.listener.task_started(task, len(self.data.tasks), names)
            started = _now()
            before = {
                part: (strategy.timings.wall.get(part, 0.0), strategy.timings.cpu.get(part, 0.0)) for part in PARTS
            }
            strategy.train(stream[task])
            with strategy.timings.part("eval"):
                seen = list(range(task + 1))
                found = evaluate(
                    strategy.model,
                    self.data,
                    seen,
                    self.inputs.eval_transform,
                    batch_size=strategy.config.eval_mb_size,
                    memory=memory,
                )
            row = {
                "schema_version": SCHEMA,
                "task": task,
                **dataclasses.asdict(found),
                **growth(strategy),
                "trainable_parameters": strategy.trainable_parameters,
                "stored_bytes": stored_bytes(strategy.model) - sum(row["stored_bytes"] for row in rows),
                "seconds": {part: strategy.timings.wall.get(part, 0.0) - before[part][0] for part in PARTS},
                "cpu_seconds": {part: strategy.timings.cpu.get(part, 0.0) - before[part][1] for part in PARTS},
                "started": started,
                "finished": _now(),
            }
            self._checkpoint(strategy.model, row, done)
            done = complete_tasks(self.out)
            rows.append(row)
            results = self._results(rows)
            assert results is not None
            write(results, self.out / "results.json")
            if self.listener is not None:
                self.listener.task_finished(results)
        assert results is not None
        return results

    def strategy(self, done: list[Path]) -> AdapterStrategy:
        """The strategy after the complete tasks ``done``."""
        model: Any = self.backbone
        if done:
            model = AdapterModel.load(done[-1] / "model", self.backbone, self.device)
        return self.experiment.strategy_class(
            model=model,
            config=self.experiment.strategy_config,
            seed=self.experiment.seed,
            device=self.device,
            evaluator=None,
            class_names=dict(enumerate(self.data.classes)),
            progress=None if self.listener is None else self.listener.progress,
            keys=self.experiment.keys,
            inference=self.experiment.predictor,
        )

    def _checkpoint(self, model: AdapterModel, row: dict[str, Any], done: list[Path]) -> None:
        previous = done[-1] / "model" if done else None
        with new_folder(self.out / "tasks" / f"{row['task']:03d}") as folder:
            save_model(model, folder / "model", link_from=previous)
            write_json(folder / "row.json", row)

    def _results(self, rows: list[dict[str, Any]]) -> Results | None:
        if not rows:
            return None
        backbone = BackboneInfo(name=self.backbone.name, fingerprint=self.backbone.fingerprint)
        return to_results(rows, self.experiment, self.data, backbone, self.description)

    def _describe(self) -> dict[str, Any]:
        packages = ["torch", "torchvision", "timm", "avalanche-lib", "numpy", "safetensors"]
        if self.data.modality == "text":
            packages += ["transformers", "tokenizers"]
        return {
            "schema_version": SCHEMA,
            "experiment": self.experiment.to_plain(),
            "backbone_fingerprint": self.backbone.fingerprint,
            "data_fingerprint": data_fingerprint(self.data),
            "versions": {"python": platform.python_version(), "cl-adapters": __version__}
            | {name: version(name) for name in packages},
            "hardware": {
                "machine": platform.machine(),
                "processors": os.cpu_count(),
                "threads": torch.get_num_threads(),
                "device": self.device,
            },
        }


def _now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
