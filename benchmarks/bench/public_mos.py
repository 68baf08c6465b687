"""MOS here against the public MOS code: accuracy, and CPU time in units of one frozen forward pass.

    python -m cl_adapters.benchmarks.bench.public_mos --images CIFAR_DIR --weights deit_tiny.safetensors --out DIR

``CIFAR_DIR`` holds CIFAR-100 as train/CLASS/*.png and test/CLASS/*.png (at least the first 50 and 10 of each class),
the weights are those of timm's ``deit_tiny_patch16_224.fb_in1k``. The settings are the ones under which the public
code (AAAI25-MOS at 8d5e07c) gave the figures below, on one thread: 112 px, bottleneck 16, SGD, batch 32, 30 alignment
epochs, 10 tasks of 10 in the class order of seed 1993; setting A: all tasks, 8 epochs at 0.03; setting B: the first 5
tasks, 20 epochs at 0.1. The public code runs 1 + tasks passes per image.
"""

from __future__ import annotations

from typing import Annotated

import typer

from cl_adapters.benchmarks.bench._command import command_of, one_of
from cl_adapters.benchmarks.bench.public_code import DeitWeights, Images, Public, RunFolder, compare

WHAT = {"released": "public code, untouched", "paper": "public code, one merge per step, evaluation pure"}
PUBLIC = {
    ("A", "released"): Public((69.0, 63.0, 60.33, 53.25, 52.0, 49.5, 48.57, 46.88, 44.33, 43.1), 929, 152, 374),
    ("A", "paper"): Public((69.0, 63.5, 59.33, 55.25, 52.4, 49.83, 49.86, 45.75, 43.67, 43.2), 903, 153, 353),
    ("B", "released"): Public((92.0, 77.5, 73.67, 71.0, 68.0), 937, 42, 60),
    ("B", "paper"): Public((92.0, 77.5, 74.0, 70.25, 66.6), 926, 42, 56),
}
SETTINGS = {"A": {"train_epochs": 8, "lr": 0.03}, "B": {"train_epochs": 20, "lr": 0.1}}


def main(
    images: Images,
    weights: DeitWeights,
    out: RunFolder,
    seed: int = 1993,
    merge: Annotated[str, typer.Option(callback=one_of(sorted(WHAT)), help="released or paper")] = "paper",
    setting: Annotated[str, typer.Option(callback=one_of(sorted(SETTINGS)), help="A or B")] = "A",
) -> None:
    """Run one schedule and print the comparison."""
    settings = {"merge": merge, **SETTINGS[setting]}
    public = PUBLIC[setting, merge]
    compare("mos", settings, public, WHAT[merge], images=images, weights=weights, seed=seed, out=out)


if __name__ == "__main__":
    command_of(main, __doc__)()
