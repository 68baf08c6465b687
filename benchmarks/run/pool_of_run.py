"""A pool of the model that a run has left."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cl_adapters.benchmarks.run.experiment import Experiment
from cl_adapters.benchmarks.run.pool_accuracy import benchmark_text
from cl_adapters.benchmarks.run.rows import TaskRow
from cl_adapters.benchmarks.run.session import complete_tasks, read_from, read_recorded, read_row
from cl_adapters.config import build
from cl_adapters.errors import StorageError
from cl_adapters.model.facade import AdapterModel
from cl_adapters.model.files import moved_backbone

if TYPE_CHECKING:
    from cl_adapters.pool import AdapterPool


def pool_of_run(
    path: Path,
    run: Path,
    *,
    task: int | None = None,
    tags: Sequence[str] = (),
    compression: str | None = None,
    weights: Path | None = None,
) -> AdapterPool:
    """Write the model of a run as a new pool, one record per adapter, or nothing of it.

    Each record names the benchmark, its classes with their names, and the accuracy that its task had then.

    Args:
        path: a folder that does not exist.
        run: folder of the run; also one of instruction tuning.
        task: the model after this task, from 0; default the last one that is complete.
        tags: of every record.
        compression: codec of the stored adapters.
        weights: of the backbone, where their file, or the folder of a transformers model, has moved.

    Raises:
        StorageError: no run there, no such task in it, or ``path`` exists.
        PoolError: the model is more than its adapters, so it cannot be a pool.
    """
    recorded = read_recorded(run)
    done = complete_tasks(run)
    wanted = len(done) - 1 if task is None else task
    if not 0 <= wanted < len(done):
        raise StorageError(f"{run} has {len(done)} complete tasks, numbered from 0; asked for task {wanted}")
    if recorded.get("instruct") is not None:
        from cl_adapters.benchmarks.run.instruct import InstructExperiment, InstructRow

        with read_from(run / "config.json"):
            benchmark = build(InstructExperiment, recorded["instruct"], "run").data
        accuracy = read_row(done[wanted], InstructRow)["generation"]
    else:
        with read_from(run / "config.json"):
            experiment = Experiment.from_plain(recorded.get("experiment") or {})
        benchmark = benchmark_text(experiment.benchmark, experiment.benchmark_config)
        accuracy = read_row(done[wanted], TaskRow)["accuracy"]
    model = done[wanted] / "model"
    return AdapterModel.load(model, None if weights is None else moved_backbone(model, weights)).save_pool(
        path,
        tags=tags,
        benchmark=benchmark,
        metrics={number: {"accuracy": float(value)} for number, value in enumerate(accuracy)},
        compression=compression,
    )
