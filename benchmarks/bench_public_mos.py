"""MOS here against the public MOS code: accuracy, and CPU time in units of one frozen forward pass.

    python -m cl_adapters.benchmarks.bench_public_mos --images CIFAR_DIR --weights deit_tiny.safetensors --out DIR

``CIFAR_DIR`` holds CIFAR-100 as train/CLASS/*.png and test/CLASS/*.png (at least the first 50 and 10 of each class),
the weights are those of timm's ``deit_tiny_patch16_224.fb_in1k``. The settings are the ones under which the public
code (AAAI25-MOS at 8d5e07c) gave the figures below, on one thread: 112 px, bottleneck 16, SGD, batch 32, 30 alignment
epochs, 10 tasks of 10 in the class order of seed 1993; setting A: all tasks, 8 epochs at 0.03; setting B: the first 5
tasks, 20 epochs at 0.1.

CPU seconds of two machines cannot be compared, so both are divided by what one frozen forward pass of one image
costs on the same machine: there about 10 ms, here measured in this run, before the first and after every task.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from cl_adapters.benchmarks.datasets import ImageDataset
from cl_adapters.benchmarks.experiment import Experiment, resolve
from cl_adapters.benchmarks.results import Results, read
from cl_adapters.benchmarks.runner import run

PUBLIC_FORWARD_MS = 10.0
WHAT = {"released": "public code, untouched", "paper": "public code, one merge per step, evaluation pure"}


@dataclass(frozen=True)
class Public:
    """What the public code reached: A_t in percent, and CPU seconds ("train" contains "alignment")."""

    curve: tuple[float, ...]
    train: float
    alignment: float
    evaluation: float


PUBLIC = {
    ("A", "released"): Public((69.0, 63.0, 60.33, 53.25, 52.0, 49.5, 48.57, 46.88, 44.33, 43.1), 929, 152, 374),
    ("A", "paper"): Public((69.0, 63.5, 59.33, 55.25, 52.4, 49.83, 49.86, 45.75, 43.67, 43.2), 903, 153, 353),
    ("B", "released"): Public((92.0, 77.5, 73.67, 71.0, 68.0), 937, 42, 60),
    ("B", "paper"): Public((92.0, 77.5, 74.0, 70.25, 66.6), 926, 42, 56),
}
SETTINGS = {"A": (10, 8, 0.03), "B": (5, 20, 0.1)}
"""Tasks, epochs, learning rate."""


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


def main() -> None:
    """Run one schedule and print the comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, required=True, help="CIFAR-100 as train/CLASS/*.png, test/CLASS/*.png")
    parser.add_argument("--weights", type=Path, required=True, help="deit_tiny_patch16_224 as .safetensors")
    parser.add_argument("--merge", choices=sorted(WHAT), default="paper")
    parser.add_argument("--setting", choices=sorted(SETTINGS), default="A")
    parser.add_argument("--seed", type=int, default=1993)
    parser.add_argument("--out", type=Path, required=True, help="run folder to make")
    options = parser.parse_args()
    torch.set_num_threads(1)
    tasks, epochs, lr = SETTINGS[options.setting]
    experiment = resolve(
        "mos",
        f"folder:{options.images}",
        backbone="timm:deit_tiny_patch16_224",
        weights=str(options.weights),
        seed=options.seed,
        settings={
            "img_size": 112,
            "crop_pct": 0.875,
            "benchmark.tasks": 10,
            "benchmark.max_train_per_class": 50,
            "benchmark.max_test_per_class": 10,
            "benchmark.order_seed": 1993,
            "merge": options.merge,
            "train_epochs": epochs,
            "train_mb_size": 32,
            "lr": lr,
            "weight_decay": 5e-4,
        },
    )
    forward = Forward(experiment, tasks)
    with contextlib.suppress(Enough):
        run(experiment, options.out, listener=forward)
    public = PUBLIC[options.setting, options.merge]
    compare(read(options.out), public, WHAT[options.merge], statistics.median(forward.ms))


def compare(results: Results, public: Public, what: str, forward_ms: float) -> None:
    """Print both curves, and the times in frozen forward passes of one image."""
    ours, curve = results.cpu_seconds, public.curve
    print(f"\nA_t here    {' '.join(f'{value:.2f}' for value in results.a_curve if value is not None)}")
    print(f"A_t public  {' '.join(f'{value:.2f}' for value in curve)}   ({what})")
    print(f"A-bar here {results.a_bar:.2f}, public {sum(curve) / len(curve):.2f}")
    print(f"passes per image {results.backbone_passes_per_image.overall:.2f} (public: 1 + tasks)")
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
        a, b = 1000 * here / forward_ms, 1000 * there / PUBLIC_FORWARD_MS
        print(f"{name:28}{here:9.1f}{there:10.1f}{a:11.0f}{b:12.0f}{b / a:13.2f}")


if __name__ == "__main__":
    main()
