"""Running continual instruction tuning task by task, with a checkpoint after each that is whole or not there.

    RUN/config.json        what is run, fingerprints of backbone and data, versions
    RUN/tasks/000/         model/ (AdapterModel) and row.json (what was measured), renamed in place when complete
    RUN/instruct.json      after every task (:mod:`cl_adapters.benchmarks.results.instruct`)

Every task's randomness is derived from (seed, task), so a resumed run gives the numbers of an uninterrupted one.
"""

from __future__ import annotations

import dataclasses
import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

from cl_adapters._io import new_folder, read_json, write_json
from cl_adapters._version import __version__
from cl_adapters.backbones.hf_forward import Pooling
from cl_adapters.backbones.load import absolute_name
from cl_adapters.benchmarks.results.instruct import FILE_NAME, InstructResults, judged, write
from cl_adapters.benchmarks.results.parts import BackboneInfo
from cl_adapters.benchmarks.run.instruct_data import read_tasks, tasks_fingerprint
from cl_adapters.benchmarks.run.run_folder import complete_tasks, exclusive
from cl_adapters.config import build, to_plain
from cl_adapters.errors import ConfigError, StorageError
from cl_adapters.language.model import LanguageModel
from cl_adapters.model.facade import AdapterModel
from cl_adapters.model.files import save_model, stored_bytes
from cl_adapters.strategies.instruct.base import InstructConfig, InstructMethod, instruct_methods
from cl_adapters.strategies.instruct.evaluation import check_answers, evaluate
from cl_adapters.strategies.instruct.tasks import InstructTask

SCHEMA = 1


class Listener(Protocol):
    """Who is told how a run goes."""

    def task_started(self, task: int, tasks: int, names: list[str]) -> None:
        """A task begins."""

    def progress(self, phase: str, done: int, total: int) -> None:
        """Within a task."""

    def task_finished(self, results: InstructResults) -> None:
        """A task is saved; ``results`` covers all tasks so far."""


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
        return build(self.method_class.Config, _nested(self.settings), self.method)


def run(
    experiment: InstructExperiment, out: Path, *, device: str = "cpu", listener: Listener | None = None
) -> InstructResults:
    """Run an experiment in the new folder ``out``.

    Raises:
        StorageError: ``out`` exists or cannot be written.
        ConfigError: settings that cannot be, or answers that are longer than what may be generated.
    """
    if out.exists():
        raise StorageError(f"{out} exists already: go on with `cl-adapters instruct --resume {out}`, or choose another")
    experiment = dataclasses.replace(experiment, model=absolute_name(experiment.model))
    session = _Session(experiment, out, device, listener)
    check_answers(session.language, session.tasks, session.config.max_new_tokens)
    with new_folder(out) as folder:
        (folder / "tasks").mkdir()
        write_json(folder / "config.json", session.description)
    return session.go()


def resume(out: Path, *, device: str = "cpu", listener: Listener | None = None) -> InstructResults:
    """Go on after the last complete task of the run in ``out``; a finished run is left as it is.

    Raises:
        StorageError: no such run there, or one that another process is writing.
        ConfigError: backbone or data are not those of the run.
    """
    recorded = read_json(out / "config.json", schema_version=SCHEMA)
    if "instruct" not in recorded:
        raise StorageError(f"{out} is no run of instruction tuning; go on with `cl-adapters resume {out}`")
    session = _Session(build(InstructExperiment, recorded["instruct"], "run"), out, device, listener)
    for key in ("backbone_fingerprint", "data_fingerprint"):
        if recorded[key] != session.description[key]:
            raise ConfigError(
                f"this run cannot be resumed, its inputs changed: {key} was {recorded[key][:16]}, now "
                f"{session.description[key][:16]}"
            )
    session.description = recorded
    return session.go()


class _Session:
    """One process working on one run folder."""

    def __init__(self, experiment: InstructExperiment, out: Path, device: str, listener: Listener | None) -> None:
        self.experiment = experiment
        self.out = out
        self.listener = listener
        self.config = experiment.config  # what is wrong with the settings is said before anything is loaded
        self.tasks = read_tasks(experiment.data, experiment.order, experiment.benchmark, experiment.seed)
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
        self.device = device
        self.description = self._describe()

    def go(self) -> InstructResults:
        """Learn and judge the tasks that are not complete."""
        with exclusive(self.out):
            done = complete_tasks(self.out)
            rows = [read_json(path / "row.json", schema_version=SCHEMA) for path in done]
            method = self._method(done)
            for task in range(len(done), len(self.tasks)):
                rows.append(self._task(method, task, rows))
                results = self._results(rows)
                write(results, self.out / FILE_NAME)
                if self.listener is not None:
                    self.listener.task_finished(results)
            results = self._results(rows)
            write(results, self.out / FILE_NAME)
        return results

    def _method(self, done: Sequence[Path]) -> InstructMethod:
        """The method after the complete tasks."""
        language = self.language
        if done:
            model = AdapterModel.load(done[-1] / "model", language.model.backbone, self.device)
            language = LanguageModel(language.lm, model)
        return self.experiment.method_class(language, self.config, self.experiment.seed)

    def _task(self, method: InstructMethod, task: int, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Learn one task, judge, and save."""
        if self.listener is not None:
            self.listener.task_started(task, len(self.tasks), [self.tasks[task].name])
        started = time.perf_counter()
        method.learn(self.tasks[task], None if self.listener is None else self.listener.progress)
        learned = time.perf_counter()
        scores = evaluate(method, self.tasks[: task + 1])
        judged_at = time.perf_counter()
        row = {
            "schema_version": SCHEMA,
            "task": task,
            **{name: list(values) for name, values in dataclasses.asdict(scores).items()},
            "train_loss": method.losses[-1],
            "trainable_parameters": method.trainable_parameters,
            "stored_bytes": stored_bytes(method.language.model) - sum(int(row["stored_bytes"]) for row in rows),
            "seconds": {"train": learned - started, "eval": judged_at - learned},
        }
        previous = self.out / "tasks" / f"{task - 1:03d}" / "model" if task else None
        with new_folder(self.out / "tasks" / f"{task:03d}") as folder:
            save_model(method.language.model, folder / "model", link_from=previous)
            write_json(folder / "row.json", row)
        return row

    def _results(self, rows: Sequence[Mapping[str, Any]]) -> InstructResults:
        tasks: Sequence[InstructTask] = self.tasks[: len(rows)]
        counts = [len(task.test) for task in tasks]
        generation = judged([row["generation"] for row in rows], counts)
        assert generation is not None
        backbone = self.language.model.backbone
        return InstructResults(
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

    def _describe(self) -> dict[str, Any]:
        packages = ["torch", "transformers", "tokenizers", "numpy", "safetensors"]
        settings = {"settings": to_plain(self.config)}
        return {
            "schema_version": SCHEMA,
            "instruct": to_plain(self.experiment) | settings,
            "backbone_fingerprint": self.language.model.backbone.fingerprint,
            "data_fingerprint": tasks_fingerprint(self.tasks),
            "versions": {"python": platform.python_version(), "cl-adapters": __version__}
            | {name: version(name) for name in packages},
        }


def _nested(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings with a dot in their name, as "adapter.rank", as fields of a mapping."""
    found: dict[str, Any] = {}
    for key, value in settings.items():
        *outer, last = key.split(".")
        place = found
        for name in outer:
            inner = place.setdefault(name, {})
            if not isinstance(inner, dict):
                raise ConfigError(f"{key} is an option of {name}, which is given as {inner!r} too: leave one out")
            place = inner
        place[last] = value
    return found
