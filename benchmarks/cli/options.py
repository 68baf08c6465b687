"""Options that several commands have, and how ``--set`` and ``--text-file`` are read."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

from cl_adapters.errors import ConfigError, DataError

Pool = Annotated[Path, typer.Argument(help="Folder of the pool.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Weights = Annotated[Path | None, typer.Option(help="The backbone's weights, if their file (hf: folder) has moved.")]
Threads = Annotated[int | None, typer.Option(help="CPU threads; default torch's own choice.", min=1, max=1024)]
Device = Annotated[str, typer.Option(help="Where to compute: cpu, cuda, cuda:1, ...")]
Texts = Annotated[list[str] | None, typer.Option("--text", help="A text instead of image files; may be repeated.")]
TextFile = Annotated[Path | None, typer.Option("--text-file", help="A file with one text per line.")]
BenchmarkSeed = Annotated[int, typer.Option(help="Of the benchmark.", min=0)]
Limit = Annotated[int | None, typer.Option(help="Test samples per class; default all.", min=1)]


def parse_settings(pairs: Iterable[str]) -> dict[str, Any]:
    """Pairs such as "lr=0.01" and "blocks=[4,5]" as keys, dotted or not, to values read as YAML.

    Raises:
        ConfigError: no KEY=VALUE, a key given twice, or a value that is no YAML.
    """
    values: dict[str, Any] = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals or not key:
            raise ConfigError(f"--set takes KEY=VALUE, got {pair!r}")
        if key in values:
            raise ConfigError(f"--set {key} is given twice")
        try:
            values[key] = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ConfigError(f"--set {key}: {text!r} is no YAML value; quote it") from error
    return values


def check_device(device: str) -> None:
    """See whether one can compute on a device.

    Raises:
        ConfigError: no, with torch's reason.
    """
    import torch

    try:
        torch.zeros(1, device=torch.device(device)).add(1).item()
    except (RuntimeError, AssertionError, ImportError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ConfigError(f"device {device!r} cannot be used here: {reason}") from error


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
