"""Every strategy on real photographs: a CIFAR-100 subset, 10 tasks of 10 classes, with DeiT-tiny at 112 px.

    python -m cl_adapters.benchmarks.bench.photographs --images CIFAR_DIR --weights deit_tiny.safetensors --out DIR

Images, weights, class order and image counts are those of ``bench_public_mos``. Sequential, RanPAC, MOS and Joint train
as MOS does in its setting A, 8 epochs at 0.03 (Joint: one epoch over everything so far after every task), LAE as in its
released CIFAR-100 configuration, SEMA as in ``bench_public_sema`` with eight cached views. One thread per run; finished
runs found under ``--out`` are not run again.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from cl_adapters.benchmarks.bench import table

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


def main() -> int:
    """Run what is missing, then print the table as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, required=True, help="CIFAR-100 as train/CLASS/*.png, test/CLASS/*.png")
    parser.add_argument("--weights", type=Path, required=True, help="deit_tiny_patch16_224 as .safetensors")
    parser.add_argument("--strategies", nargs="+", default=list(STRATEGIES), help="default: all of the docstring")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1993])
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time")
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs")
    options = parser.parse_args()
    settings = [
        "backbone.name=timm:deit_tiny_patch16_224",
        f"backbone.weights={options.weights.resolve()}",
        "backbone.img_size=112",
        "backbone.crop_pct=0.875",
        "benchmark.tasks=10",
        "benchmark.max_train_per_class=50",
        "benchmark.max_test_per_class=10",
        "benchmark.order_seed=1993",
    ]
    arguments = ["--benchmarks", f"folder:{options.images}", "--seeds", *map(str, options.seeds)]
    arguments += ["--strategies", *options.strategies, "--jobs", str(options.jobs), "--out", str(options.out)]
    return table.main([*arguments, "--set", *settings])


if __name__ == "__main__":
    sys.exit(main())
