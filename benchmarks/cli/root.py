"""The `cl-adapters` command."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from cl_adapters.benchmarks.cli.index_evaluate import app as index_app
from cl_adapters.benchmarks.cli.instruct import instruct_command
from cl_adapters.benchmarks.cli.pool_life import app as pool_app
from cl_adapters.benchmarks.cli.predict import predict_command
from cl_adapters.benchmarks.cli.settings import parse_settings
from cl_adapters.errors import ClAdaptersError, ConfigError, UnknownName

if TYPE_CHECKING:
    from cl_adapters.benchmarks.results.results import Results
    from cl_adapters.registry import Registry

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Continual learning with adapters on frozen pre-trained transformers.",
)
app.add_typer(pool_app, name="pool")
app.add_typer(index_app, name="index")
console = Console()

Out = Annotated[Path | None, typer.Option("--out", help="New folder; default runs/STRATEGY-PRESET|BENCHMARK-sSEED")]
Device = Annotated[str, typer.Option(help="Where to compute: cpu, cuda, cuda:1, ...")]
Threads = Annotated[int | None, typer.Option(help="CPU threads; default torch's own choice.", min=1)]
RunFolder = Annotated[Path, typer.Argument(help="Folder of a run.")]


@app.command("run")
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
        typer.Option(help="Another inference rule than the strategy's own; see `cl-adapters list predictors`."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of class order, initial values, augmentation, sampling.", min=0)] = 0,
    device: Device = "cpu",
    threads: Threads = None,
    out: Out = None,
) -> None:
    """Run a strategy on a benchmark: train task by task, evaluate, save, report."""
    from cl_adapters.benchmarks.run.experiment import resolve
    from cl_adapters.benchmarks.run.runner import run

    _use(device, threads)
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
    with _resumable(out), _Live() as live:
        results = run(experiment, out, device=device, listener=live)
    _finish(results, out)


@app.command("resume")
def resume_command(folder: RunFolder, device: Device = "cpu", threads: Threads = None) -> None:
    """Go on with an interrupted run after its last complete task."""
    from cl_adapters.benchmarks.run.runner import resume

    _use(device, threads)
    with _resumable(folder), _Live() as live:
        results = resume(folder, device=device, listener=live)
    _finish(results, folder)


@app.command("report")
def report_command(folder: RunFolder) -> None:
    """Write the HTML report of a run again, and print its table."""
    from cl_adapters.benchmarks.report.report import write_report
    from cl_adapters.benchmarks.results.results import read

    results = read(folder)
    write_report(results, folder / "report.html")
    _finish(results, folder)


app.command("predict")(predict_command)
app.command("instruct")(instruct_command)


@app.command("list")
def list_command(
    kind: Annotated[
        str,
        typer.Argument(
            help="strategies, methods (of instruct), benchmarks, adapters, codecs, indexes, merges, parts, predictors, "
            "presets."
        ),
    ],
) -> None:
    """List the plug-ins of one kind or the presets, with one line each."""
    if kind == "presets":
        from cl_adapters.benchmarks.run.experiment import presets

        table = Table("--strategy", "--preset", "")
        for preset in presets():
            table.add_row(preset.strategy, preset.name, _escape(preset.summary))
        console.print(table)
        return
    registry = _registry(kind)
    table = Table(kind, "")
    for name in registry.names():
        entry = registry.get(name)
        summary = getattr(entry, "summary", "") or (entry.__doc__ or "").strip().partition("\n")[0]
        table.add_row(name, summary)
    console.print(table)


def main() -> None:
    """Entry point: the package's own errors become one line and exit code 2."""
    try:
        app()
    except ClAdaptersError as error:
        Console(stderr=True, soft_wrap=True).print(f"[bold red]error:[/] {_escape(str(error))}", highlight=False)
        sys.exit(2)


@contextmanager
def _resumable(out: Path) -> Iterator[None]:
    """Say how to go on after Ctrl-C."""
    try:
        yield
    except KeyboardInterrupt:
        console.print(f"interrupted; go on with: cl-adapters resume {_escape(str(out))}", soft_wrap=True)
        raise typer.Exit(130) from None


class _Live:
    """Progress bars and one line per finished task."""

    def __init__(self) -> None:
        self._bars = Progress(
            TextColumn("{task.description}"),
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
        console.print(f"task {task + 1}/{tasks}: {_escape(shown)}", highlight=False)
        self._task = f"task {task + 1}"
        self._bar = self._bars.add_task(self._task, total=None)

    def progress(self, phase: str, done: int, total: int) -> None:
        self._bars.update(self._bar, description=f"{self._task} {phase}", completed=done, total=total)

    def task_finished(self, results: Results) -> None:
        if self._bar is not None:
            self._bars.remove_task(self._bar)
            self._bar = None
        seconds = results.seconds_per_task[-1].total
        console.print(f"  accuracy on all classes so far {results.a_last:.2f} %   ({seconds:.1f} s)", highlight=False)


def _finish(results: Results, out: Path) -> None:
    table = Table(title=f"{results.strategy} on {results.benchmark}, seed {results.seed}")
    for column in ("after task", "classes", "A_t %", "passes", "train s", "eval s"):
        table.add_column(column, justify="right")
    classes = 0
    for task, labels in enumerate(results.task_classes):
        classes += len(labels)
        seconds = results.seconds_per_task[task]
        learning = seconds.train + seconds.statistics + seconds.alignment
        passes = results.backbone_passes_per_image.per_evaluation[task]
        row = (results.a_curve[task], passes, learning, seconds.eval)
        table.add_row(str(task + 1), str(classes), *(f"{value:.2f}" for value in row if value is not None))
    console.print(table)
    forgetting = "-" if results.forgetting is None else f"{results.forgetting:.2f}"
    console.print(
        f"A-bar {results.a_bar:.2f} %   A_last {results.a_last:.2f} %   forgetting {forgetting}", highlight=False
    )
    console.print(f"results {_escape(str(out / 'results.json'))}", highlight=False, soft_wrap=True)
    console.print(f"report  {_escape(str(out / 'report.html'))}", highlight=False, soft_wrap=True)


def _use(device: str, threads: int | None) -> None:
    import torch

    try:
        torch.empty(0, device=torch.device(device))
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"device {device!r} cannot be used here: {str(error).splitlines()[0]}") from error
    if threads is not None:
        torch.set_num_threads(threads)


def _registry(kind: str) -> Registry[Any]:
    from cl_adapters.adapters import adapters
    from cl_adapters.benchmarks.base import benchmarks
    from cl_adapters.codecs import codecs
    from cl_adapters.index import indexes
    from cl_adapters.merge import merges
    from cl_adapters.parts import parts
    from cl_adapters.predictors import predictors
    from cl_adapters.strategies.instruct import instruct_methods

    known: dict[str, Any] = {"adapters": adapters, "benchmarks": benchmarks, "merges": merges}
    known |= {"codecs": codecs, "indexes": indexes, "parts": parts, "predictors": predictors}
    known |= {"methods": instruct_methods}
    if kind == "strategies":
        from cl_adapters.strategies.base import strategies

        return strategies
    if kind not in known:
        raise UnknownName.of("kind of plug-in", kind, [*known, "strategies", "presets"])
    registry: Registry[Any] = known[kind]
    return registry


def _escape(text: str) -> str:
    from rich.markup import escape

    return escape(text)


if __name__ == "__main__":
    main()
