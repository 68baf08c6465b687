r"""SEMA here against the public SEMA code: accuracy, expansions, and CPU time in units of one frozen forward pass.

    python -m cl_adapters.benchmarks.bench.public_sema --images CIFAR_DIR --weights deit_tiny.safetensors \
        --cached-views 4 --out DIR

Images and weights as in ``bench.public_mos``. The settings are the ones under which the public code (SEMA-CL at
5a45512, without its evaluation after every epoch) gave the figures below, on one thread: 112 px, expandable blocks
9-11, bottleneck 16, descriptor 32, threshold 1, SGD at 0.005 with batch 32, 20 + 10 epochs, the first 5 of 10 tasks
of 10 classes.
"""

from __future__ import annotations

from typing import Annotated

import typer

from cl_adapters.benchmarks.bench._command import command_of
from cl_adapters.benchmarks.bench.public_code import DeitWeights, Images, Public, RunFolder, compare

PUBLIC = Public((92.0, 73.0, 63.0, 56.25, 55.8), 942, 0, 12)
WHAT = "public code; it expanded once, at task 3, in all three blocks"


def main(
    images: Images,
    weights: DeitWeights,
    out: RunFolder,
    seed: int = 1993,
    cached_views: Annotated[int, typer.Option(help="K cached views per image; 0: fresh augmentation")] = 0,
) -> None:
    """Run it and print the comparison."""
    settings = {
        "expandable": [9, 10, 11],
        "adapter.bottleneck": 16,
        "descriptor_dim": 32,
        "threshold": 1.0,
        "lr": 0.005,
        "train_epochs": 20,
        "descriptor_epochs": 10,
        "cached_views": cached_views,
    }
    results = compare("sema", settings, PUBLIC, WHAT, images=images, weights=weights, seed=seed, out=out)
    for found in results.expansions or ():
        print(
            f"task {found.task + 1}: block {found.block} expanded (score {found.score:.2f} > {found.threshold:g}, "
            f"pass {found.scan + 1}, batch {found.batch + 1})"
        )


if __name__ == "__main__":
    command_of(main, __doc__)()
