"""The `cl-adapters predict` command: classify image files or texts with the model of a run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from cl_adapters.errors import ConfigError, DataError

console = Console()

Texts = Annotated[list[str] | None, typer.Option("--text", help="A text instead of image files; may be repeated.")]
TextFile = Annotated[Path | None, typer.Option("--text-file", help="A file with one text per line.")]

REFUSED = "none of these"
"""In place of a class where the model abstains."""


def predict_command(
    run: Annotated[Path, typer.Option("--run", help="Folder of a run.")],
    images: Annotated[list[Path] | None, typer.Argument(help="Image files.")] = None,
    text: Texts = None,
    text_file: TextFile = None,
    weights: Annotated[
        Path | None, typer.Option(help="The backbone's weights, if their file (hf: folder) has moved.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
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
        typer.echo(json.dumps(rows, indent=1))
        return
    table = Table("text" if texts else "image", "class", "score", "adapter", "next best")
    for answer in answers:
        near = ", ".join(f"{name} {score:.3f}" for name, score in answer.ranking[not answer.abstained :][:2])
        adapter = "none" if answer.adapter < 0 else str(answer.adapter)
        said = (REFUSED, "-") if answer.abstained else (answer.name, f"{answer.score:.3f}")
        table.add_row(*map(escape, (answer.input, *said, adapter, near)))
    console.print(table)


def given_texts(texts: Sequence[str] | None, file: Path | None) -> list[str]:
    """The texts of ``--text`` and ``--text-file`` together; lines without a character are left out.

    Raises:
        DataError: a file that cannot be read, or has no text.
    """
    if file is None:
        return list(texts or [])
    try:
        lines = file.read_text(encoding="utf-8-sig").split("\n")  # splitlines also cuts at signs within a line
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{file} is not UTF-8 text ({error}); save it as UTF-8") from error
    found = [line for line in lines if line.strip()]
    if not found:
        raise DataError(f"{file} has no text: one per line is expected")
    return [*(texts or []), *found]
