"""Running continual instruction tuning: ``instruct.json`` after every task.

The folder and the order of events are those of :mod:`cl_adapters.benchmarks.run.session`.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cl_adapters.backbones.hf_forward import Pooling
from cl_adapters.backbones.load import absolute_name
from cl_adapters.benchmarks.data._instructions import read_tasks, tasks_fingerprint
from cl_adapters.benchmarks.results.instruct import FILE_NAME, InstructResults, judged, write
from cl_adapters.benchmarks.results.parts import BackboneInfo
from cl_adapters.benchmarks.run.rows import check_percent
from cl_adapters.benchmarks.run.session import (
    Listener,
    Progress,
    Row,
    changed_inputs,
    continue_run,
    describe,
    read_from,
    read_recorded,
    recorded_threads,
    refuse_taken,
    start,
)
from cl_adapters.config import build, check_range, put_nested, to_plain
from cl_adapters.errors import ConfigError, StorageError
from cl_adapters.language.model import LanguageModel
from cl_adapters.model.facade import AdapterModel
from cl_adapters.model.files import stored_bytes
from cl_adapters.strategies.instruct.base import InstructConfig, InstructMethod, instruct_methods
from cl_adapters.strategies.instruct.evaluation import check_answers, evaluate

__all__ = ["InstructExperiment", "Listener", "resume", "run"]


@dataclass(frozen=True, kw_only=True)
class InstructExperiment:
    """One method on one sequence of tasks with one language model and one seed.

    Attributes:
        method: registered name.
        model: "hf:" and a folder or hub name of a decoder.
        data: as :func:`read_tasks` takes it.
        order: names of the tasks; None: the order of the data.
        benchmark: options of a benchmark that the tasks are made of.
        settings: of the method, by field.
        pooling, max_length, dtype, quantization: of :meth:`LanguageModel.load`.
        seed: of everything random.
    """

    method: str
    model: str
    data: str
    order: tuple[str, ...] | None = None
    benchmark: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    pooling: Pooling | None = None
    max_length: int | None = None
    dtype: str | None = None
    quantization: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        check_range(self, "[0, inf)", "seed")
        check_range(self, "[1, inf)", "max_length")

    @property
    def method_class(self) -> type[InstructMethod]:
        """The method.

        Raises:
            UnknownName: there is no such.
        """
        return instruct_methods.get(self.method)

    @property
    def config(self) -> InstructConfig:
        """The method's settings, checked.

        Raises:
            ConfigError: an unknown one, or a wrong value.
        """
        nested: dict[str, Any] = {}
        for key, value in self.settings.items():
            put_nested(nested, key.split("."), value)
        return build(self.method_class.Config, nested, self.method)


def run(
    experiment: InstructExperiment,
    out: Path,
    *,
    device: str = "cpu",
    listener: Listener[InstructResults] | None = None,
) -> InstructResults:
    """Run an experiment in the new folder ``out``.

    Raises:
        StorageError: ``out`` exists or cannot be written.
        ConfigError: settings that cannot be, or answers that are longer than what may be generated.
    """
    refuse_taken(out, f"go on with `cl-adapters instruct --resume {out}`")
    runner = _Runner(dataclasses.replace(experiment, model=absolute_name(experiment.model)), device)
    check_answers(runner.language, runner.sequence, runner.config.max_new_tokens)
    return start(runner, out, listener)


def resume(out: Path, *, device: str = "cpu", listener: Listener[InstructResults] | None = None) -> InstructResults:
    """Go on after the last complete task of the run in ``out``, with its CPU threads; a finished run stays as it is.

    Raises:
        StorageError: no such run there, an altered or incomplete one, or one that another process is writing.
        ConfigError: backbone or data are not those of the run.
    """
    recorded = read_recorded(out)
    if recorded.get("instruct") is None:
        raise StorageError(f"{out} is no run of instruction tuning; go on with `cl-adapters resume {out}`")
    with read_from(out / "config.json"):
        experiment = build(InstructExperiment, recorded["instruct"], "run")
        experiment.config  # noqa: B018 - checks the method and its settings
    with recorded_threads(recorded, None):
        runner = _Runner(experiment, device)
        for key, then, now in changed_inputs(recorded, runner.description):
            raise ConfigError(f"this run cannot be resumed, its inputs changed: {key} was {then[:16]}, now {now[:16]}")
        return continue_run(runner, out, listener, recorded)


@dataclass(frozen=True, kw_only=True)
class InstructRow:
    """What ``row.json`` holds, for checking what was read.

    Raises:
        ValueError: lists that do not belong to tasks 0..task, a share outside 0..100, a missing or negative time.
    """

    task: int
    likelihood: tuple[float | None, ...]
    generation: tuple[float, ...]
    train_loss: float
    trainable_parameters: int
    stored_bytes: int
    seconds: dict[str, float]

    def __post_init__(self) -> None:
        check_percent(self.likelihood, self.task + 1, "likelihood")
        check_percent(self.generation, self.task + 1, "generation")
        check_range(self, "[0, inf)", "trainable_parameters")
        if set(self.seconds) != {"train", "eval"} or min(self.seconds.values()) < 0:
            raise ValueError(f"seconds must be those of train and eval, got {self.seconds}")


class _Runner:
    """The :class:`TaskRunner` of a method on a sequence of tasks."""

    row_type = InstructRow

    def __init__(self, experiment: InstructExperiment, device: str) -> None:
        self.experiment = experiment
        self.device = device
        self.config = experiment.config  # what is wrong with the settings is said before anything is loaded
        self.sequence = read_tasks(experiment.data, experiment.order, experiment.benchmark, experiment.seed)
        self.tasks: Sequence[Sequence[str]] = [[task.name] for task in self.sequence]
        self.language = LanguageModel.load(
            experiment.model,
            adapter=self.config.adapter,
            blocks=self.config.blocks,
            keys=self.config.keys,
            pooling=experiment.pooling,
            max_length=experiment.max_length,
            dtype=experiment.dtype,
            quantization=experiment.quantization,
        ).to(device)
        self.description = describe(
            {"instruct": to_plain(experiment) | {"settings": to_plain(self.config)}},
            self.language.model.backbone.fingerprint,
            tasks_fingerprint(self.sequence),
            ["torch", "transformers", "tokenizers", "numpy", "safetensors"],
            device,
        )

    @property
    def model(self) -> AdapterModel:
        """The method's."""
        return self.method.language.model

    def restore(self, done: Sequence[Path], progress: Progress | None) -> None:
        """Build the method, on the model of the last complete task if there is one."""
        language = self.language
        if done:
            model = AdapterModel.load(done[-1] / "model", language.model.backbone, self.device)
            language = LanguageModel(language.lm, model)
        self.method: InstructMethod = self.experiment.method_class(language, self.config, self.experiment.seed)
        self.progress = progress

    def run_task(self, task: int, rows: Sequence[Row]) -> Row:
        """Learn one task, then judge all so far."""
        started = time.perf_counter()
        self.method.learn(self.sequence[task], self.progress)
        learned = time.perf_counter()
        scores = evaluate(self.method, self.sequence[: task + 1])
        judged_at = time.perf_counter()
        return {
            **{name: list(values) for name, values in dataclasses.asdict(scores).items()},
            "train_loss": self.method.losses[-1],
            "trainable_parameters": self.method.trainable_parameters,
            "stored_bytes": stored_bytes(self.model) - sum(int(row["stored_bytes"]) for row in rows),
            "seconds": {"train": learned - started, "eval": judged_at - learned},
        }

    def save(self, rows: Sequence[Row], out: Path) -> InstructResults:
        """Write ``instruct.json``."""
        tasks = self.sequence[: len(rows)]
        counts = [len(task.test) for task in tasks]
        generation = judged([row["generation"] for row in rows], counts)
        assert generation is not None
        backbone = self.language.model.backbone
        results = InstructResults(
            method=self.experiment.method,
            data=self.experiment.data,
            backbone=BackboneInfo(name=backbone.name, fingerprint=backbone.fingerprint),
            seed=self.experiment.seed,
            tasks=tuple(task.name for task in tasks),
            train_counts=tuple(len(task.train) for task in tasks),
            likelihood=judged([row["likelihood"] for row in rows], counts),
            generation=generation,
            train_loss=tuple(row["train_loss"] for row in rows),
            trainable_parameters=tuple(row["trainable_parameters"] for row in rows),
            stored_bytes_per_task=tuple(row["stored_bytes"] for row in rows),
            seconds_train=tuple(row["seconds"]["train"] for row in rows),
            seconds_eval=tuple(row["seconds"]["eval"] for row in rows),
            config=self.description["instruct"],
            versions=self.description["versions"],
        )
        write(results, out / FILE_NAME)
        return results

    def finish(self, results: InstructResults, out: Path) -> None:
        """Nothing more."""
