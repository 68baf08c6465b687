"""Every strategy on real photographs: a CIFAR-100 subset, 10 tasks of 10 classes, with DeiT-tiny at 112 px.

    python -m cl_adapters.benchmarks.bench.photographs --images CIFAR_DIR --weights deit_tiny.safetensors --out DIR

Images, weights, class order and image counts are those of ``bench.public_mos``. Sequential, RanPAC, MOS and Joint train
as MOS does in its setting A, 8 epochs at 0.03 (Joint: one epoch over everything so far after every task), LAE as in its
released CIFAR-100 configuration, SEMA as in ``bench.public_sema`` with eight cached views. One thread per run; finished
runs found under ``--out`` are not run again.
"""

from __future__ import annotations

from typing import Annotated

import typer

from cl_adapters.benchmarks.bench import table
from cl_adapters.benchmarks.bench._command import Jobs, RunsFolder, command_of
from cl_adapters.benchmarks.bench.public_code import BACKBONE, SETTINGS, DeitWeights, Images

SETTING_A = "train_mb_size=32,train_epochs=8,lr=0.03"
STRATEGIES = (
    "simple_cil",
    f"sequential:{SETTING_A}",
    f"ranpac:{SETTING_A}",
    "lae",
    "lae:adapter.type=lora,adapter.learn_scale=true",
    "lae:adapter.type=prefix",
    "sema:expandable=[9,10,11],adapter.bottleneck=16,descriptor_dim=32,threshold=1.0,lr=0.005,train_mb_size=32,"
    "train_epochs=20,descriptor_epochs=10,cached_views=8",
    f"mos:{SETTING_A}",
    "joint:train_mb_size=32,train_epochs=1,lr=0.03",
)


def main(
    images: Images,
    weights: DeitWeights,
    out: RunsFolder,
    strategies: Annotated[list[str] | None, typer.Option(help="Default: all of the docstring.")] = None,
    seeds: Annotated[list[int] | None, typer.Option(help="Default 1993.")] = None,
    jobs: Jobs = 1,
) -> None:
    """Run what is missing, then print the table as Markdown."""
    settings = [f"backbone.name={BACKBONE}", f"backbone.weights={weights.resolve()}"]
    settings += [f"{key}={value}" for key, value in SETTINGS.items()]
    table.main(out, [f"folder:{images}"], strategies or list(STRATEGIES), seeds or [1993], settings, jobs)


if __name__ == "__main__":
    command_of(main, __doc__)()
