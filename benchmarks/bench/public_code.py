"""What the benches against public code share: the photographs, the frozen forward pass as a unit, two curves.

CPU seconds of two machines cannot be compared, so both are divided by what one frozen forward pass of one image costs
on the same machine: there about 10 ms, here measured in the run itself, before the first and after every task.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from cl_adapters.benchmarks.results.results import Results, read
from cl_adapters.benchmarks.run.experiment import Experiment, resolve
from cl_adapters.benchmarks.run.runner import run
from cl_adapters.benchmarks.streams.datasets import ImageDataset

PUBLIC_FORWARD_MS = 10.0
BACKBONE = "timm:deit_tiny_patch16_224"
SETTINGS: dict[str, Any] = {
    "img_size": 112,
    "crop_pct": 0.875,
    "benchmark.tasks": 10,
    "benchmark.max_train_per_class": 50,
    "benchmark.max_test_per_class": 10,
    "benchmark.order_seed": 1993,
}
"""The photographs, the same for all methods."""

Images = Annotated[Path, typer.Option(help="CIFAR-100 as train/CLASS/*.png, test/CLASS/*.png")]
DeitWeights = Annotated[Path, typer.Option(help="deit_tiny_patch16_224 as .safetensors")]
RunFolder = Annotated[Path, typer.Option(help="Run folder to make.")]


@dataclass(frozen=True)
class Public:
    """What the public code reached: A_t in percent, and CPU seconds ("train" contains "alignment")."""

    curve: tuple[float, ...]
    train: float
    alignment: float
    evaluation: float


class Enough(Exception):
    """Ends a run after the tasks that are compared."""


class Forward:
    """Measures the frozen forward pass between tasks and says how the run goes."""

    def __init__(self, experiment: Experiment, tasks: int) -> None:
        self.tasks = tasks
        self.backbone = experiment.backbone.load()
        assert self.backbone.preprocessing is not None
        data = experiment.benchmark_config.load(experiment.seed)
        images = ImageDataset(data.test, range(32), self.backbone.preprocessing.eval_transform())
        self.x = torch.stack([images[i][0] for i in range(32)])
        self.ms: list[float] = []
        self.measure()

    def measure(self, repeats: int = 12) -> None:
        """CPU milliseconds per image, batch 32."""
        with torch.inference_mode():
            for _ in range(repeats):
                start = time.process_time()
                self.backbone(self.x)
                self.ms.append(1000 * (time.process_time() - start) / len(self.x))

    def task_started(self, task: int, tasks: int, names: list[str]) -> None:
        """Nothing."""

    def progress(self, phase: str, done: int, total: int) -> None:
        """Nothing."""

    def task_finished(self, results: Results) -> None:
        """One line, and a measurement."""
        self.measure()
        print(f"task {results.num_tasks}: {results.a_last:.2f} %", flush=True)
        if results.num_tasks == self.tasks:
            raise Enough


def compare(
    strategy: str,
    settings: Mapping[str, Any],
    public: Public,
    what: str,
    *,
    images: Path,
    weights: Path,
    seed: int,
    out: Path,
) -> Results:
    """Run a strategy on the tasks that the public code was run on, on one thread.

    Prints both curves, and the times in frozen forward passes of one image (median over the run).
    """
    torch.set_num_threads(1)
    experiment = resolve(
        strategy,
        f"folder:{images}",
        backbone=BACKBONE,
        weights=str(weights),
        seed=seed,
        settings={**SETTINGS, "train_mb_size": 32, "weight_decay": 5e-4, **settings},
    )
    forward = Forward(experiment, len(public.curve))
    with contextlib.suppress(Enough):
        run(experiment, out, listener=forward)
    results, forward_ms = read(out), statistics.median(forward.ms)
    ours, curve = results.cpu_seconds, public.curve
    print(f"\nA_t here    {' '.join(f'{value:.2f}' for value in results.a_curve if value is not None)}")
    print(f"A_t public  {' '.join(f'{value:.2f}' for value in curve)}   ({what})")
    print(f"A-bar here {results.a_bar:.2f}, public {sum(curve) / len(curve):.2f}")
    print(f"passes per image {results.backbone_passes_per_image.overall:.2f}")
    print(
        f"one frozen forward: here {forward_ms:.2f} ms/image (median of this run), public about {PUBLIC_FORWARD_MS:g}"
    )
    rows = {
        "training without alignment": (ours.train + ours.statistics, public.train - public.alignment),
        "alignment": (ours.alignment, public.alignment),
        "evaluation": (ours.eval, public.evaluation),
    }
    print(f"{'CPU time':28}{'here s':>9}{'public s':>10}{'here fwd':>11}{'public fwd':>12}{'public/here':>13}")
    for name, (here, there) in rows.items():
        if there:
            a, b = 1000 * here / forward_ms, 1000 * there / PUBLIC_FORWARD_MS
            print(f"{name:28}{here:9.1f}{there:10.1f}{a:11.0f}{b:12.0f}{b / a:13.2f}")
    return results
