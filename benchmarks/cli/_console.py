"""How all commands print: one console, plain lines, JSON."""

from __future__ import annotations

import json
import math
from typing import Any

import typer
from rich.console import Console
from rich.text import Text

console = Console()


def shown(text: str) -> Text:
    """Text of users and files as people may see it: no markup, and what would steer the terminal spelled out."""
    return Text("".join(sign if sign.isprintable() else repr(sign)[1:-1] for sign in text))


def say(text: str, *, wrapped: bool = False) -> None:
    """Print a line as it is, without markup and colours; not wrapped unless asked for."""
    console.print(shown(text), soft_wrap=not wrapped)


def print_json(content: object) -> None:
    """Print strict JSON as it is, whatever the width of the terminal; null where a number is not finite."""
    typer.echo(json.dumps(_finite(content), indent=1, allow_nan=False))


def print_error(text: str, kind: str = "error") -> None:
    """Print why a command ends, or what it warns of, where errors go."""
    Console(stderr=True, soft_wrap=True).print(Text.assemble((f"{kind}:", "bold red"), " ", shown(text)))


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
