"""`cl-adapters run`, `resume` and `report`: learn a benchmark task by task, and show what came out."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from cl_adapters.benchmarks.cli._console import console, say, shown
from cl_adapters.benchmarks.cli.options import Device, Threads, check_device, parse_settings

if TYPE_CHECKING:
    from cl_adapters.benchmarks.results.results import Results

Out = Annotated[Path | None, typer.Option("--out", help="New folder; default runs/STRATEGY-PRESET|BENCHMARK-sSEED")]
RunFolder = Annotated[Path, typer.Argument(help="Folder of a run.")]


def run_command(
    strategy: Annotated[str, typer.Option(help="Strategy; see `cl-adapters list strategies`.")],
    benchmark: Annotated[str, typer.Option(help="Benchmark, or NAME:ARGUMENT such as folder:photos or text:FILE.")],
    preset: Annotated[
        str | None, typer.Option(help="Settings to start from, default BENCHMARK's; see `cl-adapters list presets`.")
    ] = None,
    backbone: Annotated[str | None, typer.Option(help="Embedded name, timm:MODEL, or hf:FOLDER_OR_NAME.")] = None,
    weights: Annotated[Path | None, typer.Option(help="Local .safetensors weights of the backbone.")] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="lr=0.01, benchmark.tasks=10, img_size=112, ..."),
    ] = None,
    keys: Annotated[
        str | None,
        typer.Option(help="Keep keys of the classes, for a pool: prototypes, centroids or features."),
    ] = None,
    predictor: Annotated[
        str | None,
        typer.Option(help="Another predictor than the strategy's own; see `cl-adapters list predictors`."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of class order, initial values, augmentation, sampling.", min=0)] = 0,
    device: Device = "cpu",
    threads: Threads = None,
    out: Out = None,
) -> None:
    """Run a strategy on a benchmark: train task by task, evaluate, save, report."""
    from cl_adapters.benchmarks.run.experiment import resolve
    from cl_adapters.benchmarks.run.runner import run

    check_device(device)
    if threads is not None:
        import torch

        torch.set_num_threads(threads)
    given = {"keys.kind": keys, "predictor.type": predictor}
    named = {key: value for key, value in given.items() if value is not None}
    experiment = resolve(
        strategy,
        benchmark,
        preset=preset,
        backbone=backbone,
        weights=None if weights is None else str(weights),
        seed=seed,
        settings=named | parse_settings(settings or []),
    )
    out = out or Path("runs") / f"{strategy}-{preset or experiment.benchmark}-s{seed}"
    with resumable(out, f"cl-adapters resume {out}"), _Live() as live:
        results = run(experiment, out, device=device, listener=live)
    _finish(results, out)


def resume_command(
    folder: RunFolder,
    device: Device = "cpu",
    threads: Annotated[
        int | None, typer.Option(help="CPU threads; default those of the run, for the same bits.", min=1, max=1024)
    ] = None,
) -> None:
    """Go on with an interrupted run after its last complete task."""
    from cl_adapters.benchmarks.run.runner import resume

    check_device(device)
    note_threads(folder, threads)
    with resumable(folder, f"cl-adapters resume {folder}"), _Live() as live:
        results = resume(folder, device=device, threads=threads, listener=live)
    _finish(results, folder)


def report_command(folder: RunFolder) -> None:
    """Write the HTML report of a run again, and print its table."""
    from cl_adapters.benchmarks.report.report import write_report
    from cl_adapters.benchmarks.results.results import read

    results = read(folder)
    write_report(results, folder / "report.html")
    _finish(results, folder)


class _Terminated(KeyboardInterrupt):
    """SIGTERM, which then ends a run as Ctrl-C does."""


@contextmanager
def resumable(out: Path, command: str) -> Iterator[None]:
    """Say how to go on after Ctrl-C or SIGTERM: with ``command`` if the run has begun in ``out``."""

    def terminate(*signal: Any) -> None:
        raise _Terminated

    main = threading.current_thread() is threading.main_thread()  # no other can set what signals do
    before = signal.signal(signal.SIGTERM, terminate) if main else None
    try:
        yield
    except KeyboardInterrupt as stopped:
        begun = (out / "config.json").is_file()
        say(f"interrupted; go on with: {command}" if begun else "interrupted before anything was written")
        raise typer.Exit(143 if isinstance(stopped, _Terminated) else 130) from None
    finally:
        if main:
            signal.signal(signal.SIGTERM, before)


class _Live:
    """Progress bars and one line per finished task."""

    def __init__(self) -> None:
        self._bars = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            transient=True,
        )
        self._bar: Any = None
        self._task = ""

    def __enter__(self) -> _Live:
        self._bars.__enter__()
        return self

    def __exit__(self, *failure: Any) -> None:
        self._bars.__exit__(*failure)

    def task_started(self, task: int, tasks: int, names: list[str]) -> None:
        shown = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
        say(f"task {task + 1}/{tasks}: {shown}", wrapped=True)
        self._task = f"task {task + 1}"
        self._bar = self._bars.add_task(self._task, total=None)

    def progress(self, phase: str, done: int, total: int) -> None:
        self._bars.update(self._bar, description=f"{self._task} {phase}", completed=done, total=total)

    def task_finished(self, results: Results) -> None:
        if self._bar is not None:
            self._bars.remove_task(self._bar)
            self._bar = None
        seconds = results.seconds_per_task[-1].total
        say(f"  accuracy on all classes so far {number(results.a_last)} %   ({seconds:.1f} s)", wrapped=True)


def _finish(results: Results, out: Path) -> None:
    table = Table(title=shown(f"{results.strategy} on {results.benchmark}, seed {results.seed}"))
    for column in ("after task", "classes", "A_t %", "passes", "train s", "eval s"):
        table.add_column(column, justify="right")
    classes = 0
    for task, labels in enumerate(results.task_classes):
        classes += len(labels)
        seconds = results.seconds_per_task[task]
        learning = seconds.train + seconds.statistics + seconds.alignment
        passes = results.backbone_passes_per_image.per_evaluation[task]
        row = (results.a_curve[task], passes, learning, seconds.eval)
        table.add_row(str(task + 1), str(classes), *map(number, row))
    console.print(table)
    say(
        f"A-bar {number(results.a_bar)} %   A_last {number(results.a_last)} %   "
        f"forgetting {number(results.forgetting)}",
        wrapped=True,
    )
    say(f"results {out / 'results.json'}")
    say(f"report  {out / 'report.html'}")


def note_threads(folder: Path, threads: int | None) -> None:
    """Say so where a run does not tell with how many CPU threads it computed, and none are asked for."""
    from cl_adapters.benchmarks.run.session import read_recorded, threads_of

    if threads is None and threads_of(read_recorded(folder)) is None:
        say("note: this run does not tell its CPU threads; with another number than before, bits may differ")


def number(value: float | None) -> str:
    """With two decimals; a dash for what was not measured."""
    return "-" if value is None else f"{value:.2f}"
