"""`cl-adapters instruct`: a decoder learns tasks of prompts one after the other."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from cl_adapters.benchmarks.cli._console import console, say, shown
from cl_adapters.benchmarks.cli.options import Device, check_device, parse_settings
from cl_adapters.benchmarks.cli.run import note_threads, number, resumable
from cl_adapters.config import build
from cl_adapters.errors import ConfigError

if TYPE_CHECKING:
    from cl_adapters.benchmarks.results.instruct import InstructResults, Judged

LOADING = ("pooling", "max_length", "dtype", "quantization")


def instruct_command(
    model: Annotated[str | None, typer.Option(help="hf:FOLDER_OR_NAME of a decoder.")] = None,
    data: Annotated[
        str | None,
        typer.Option(
            help="Folder with TASK.train.jsonl and TASK.test.jsonl (lines with prompt, answer and, where there are "
            "label strings, choices), or a benchmark such as text:FILE."
        ),
    ] = None,
    method: Annotated[str, typer.Option(help="sequential, o_lora or retrieve.")] = "retrieve",
    out: Annotated[Path | None, typer.Option(help="New folder of the run.")] = None,
    order: Annotated[str | None, typer.Option(help="Names of the tasks, separated by commas.")] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="lr=0.001, adapter.rank=16, max_length=256, benchmark.tasks=5"),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of initial values, order, sampling.", min=0)] = 0,
    device: Device = "cpu",
    resume: Annotated[Path | None, typer.Option(help="Go on with the interrupted run in this folder.")] = None,
) -> None:
    """Continual instruction tuning: learn task by task, judge by likelihood and by generation, save."""
    from cl_adapters.benchmarks.run import instruct

    check_device(device)
    listener = _Told()
    if resume is not None:
        if any(value is not None for value in (model, data, out, order)) or settings:
            raise ConfigError("--resume takes everything from the folder of the run: leave the other options out")
        folder = resume
        note_threads(folder, None)
        with resumable(folder, f"cl-adapters instruct --resume {folder}"):
            results = instruct.resume(folder, device=device, listener=listener)
    else:
        if model is None or data is None or out is None:
            raise ConfigError("give --model hf:FOLDER, --data FOLDER and --out RUN, or --resume RUN")
        given = parse_settings(settings or [])
        plain = {
            "method": method,
            "model": model,
            "data": data,
            "order": None if order is None else tuple(name.strip() for name in order.split(",")),
            "benchmark": {key.partition(".")[2]: value for key, value in given.items() if key.startswith("benchmark.")},
            "settings": {k: v for k, v in given.items() if k not in LOADING and not k.startswith("benchmark.")},
            "seed": seed,
            **{key: given[key] for key in LOADING if key in given},
        }
        experiment = build(instruct.InstructExperiment, plain)
        folder = out
        with resumable(folder, f"cl-adapters instruct --resume {folder}"):
            results = instruct.run(experiment, folder, device=device, listener=listener)
    show(results)
    say(f"results {folder / 'instruct.json'}")


def show(results: InstructResults) -> None:
    """Print both accuracy matrices with their figures."""
    if results.likelihood is not None:
        _show(results, results.likelihood, "by likelihood")
    _show(results, results.generation, "by generation")


class _Told:
    """One line per task."""

    def task_started(self, task: int, tasks: int, names: list[str]) -> None:
        say(f"task {task + 1}/{tasks}: {', '.join(names)}", wrapped=True)

    def progress(self, phase: str, done: int, total: int) -> None:
        pass

    def task_finished(self, results: InstructResults) -> None:
        seconds = results.seconds_train[-1] + results.seconds_eval[-1]
        last = number(results.generation.a_last)
        say(f"  exact match on all tasks so far {last} %   ({seconds:.1f} s)", wrapped=True)


def _show(results: InstructResults, judged: Judged, how: str) -> None:
    say(f"{results.method} on {results.data}, seed {results.seed}: exact match {how}, %")
    table = Table("after task")
    for name in results.tasks:
        table.add_column(shown(name), justify="right")
    table.add_column("A_t", justify="right")
    for name, row, mean in zip(results.tasks, judged.accuracy_matrix, judged.a_curve, strict=True):
        table.add_row(shown(name), *map(number, row), number(mean))
    console.print(table)
    say(
        f"A-bar {number(judged.a_bar)}   A_last {number(judged.a_last)}   "
        f"forgetting {number(judged.forgetting)}   BWT {number(judged.backward_transfer)}",
        wrapped=True,
    )
