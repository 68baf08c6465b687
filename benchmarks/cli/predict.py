"""The `cl-adapters predict` command: classify image files or texts with the model of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from cl_adapters.benchmarks.cli._console import console, print_json, shown
from cl_adapters.benchmarks.cli.options import Json, TextFile, Texts, Weights, given_texts
from cl_adapters.errors import ConfigError

REFUSED = "none of these"
"""In place of a class where the model abstains."""


def predict_command(
    run: Annotated[Path, typer.Option("--run", help="Folder of a run.")],
    images: Annotated[list[Path] | None, typer.Argument(help="Image files.")] = None,
    text: Texts = None,
    text_file: TextFile = None,
    weights: Weights = None,
    as_json: Json = False,
) -> None:
    """Classify image files, or texts, with the model of a run."""
    from cl_adapters.benchmarks.run.runner import latest_model

    texts = given_texts(text, text_file)
    if bool(images) == bool(texts):
        raise ConfigError("give image files, or texts (--text TEXT, --text-file FILE)" + (", not both" * bool(texts)))
    model = latest_model(run, weights)
    answers = model.predict_texts(texts) if texts else model.predict_files(images or [])
    kind = "text" if texts else "file"
    if as_json:
        rows = [
            {
                kind: a.input,
                "class": a.name,
                "label": a.label,
                "score": a.score,
                "adapter": a.adapter,
                "abstained": a.abstained,
                "top": a.ranking,
            }
            for a in answers
        ]
        print_json(rows)
        return
    table = Table("text" if texts else "image", "class", "score", "adapter", "next best")
    for answer in answers:
        near = ", ".join(f"{name} {score:.3f}" for name, score in answer.ranking[not answer.abstained :][:2])
        adapter = "none" if answer.adapter < 0 else str(answer.adapter)
        said = (REFUSED, "-") if answer.abstained else (answer.name, f"{answer.score:.3f}")
        table.add_row(*map(shown, (answer.input, *said, adapter, near)))
    console.print(table)
