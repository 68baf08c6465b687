"""How all commands print: one console, plain lines, JSON."""

from __future__ import annotations

import json

import typer
from rich.console import Console
from rich.markup import escape

console = Console()


def say(text: str, *, wrapped: bool = False) -> None:
    """Print a line as it is, without markup and colours; not wrapped unless asked for."""
    console.print(escape(text), highlight=False, soft_wrap=not wrapped)


def print_json(content: object) -> None:
    """Print JSON as it is, whatever the width of the terminal."""
    typer.echo(json.dumps(content, indent=1))


def print_error(text: str) -> None:
    """Print why a command ends, where errors go."""
    Console(stderr=True, soft_wrap=True).print(f"[bold red]error:[/] {escape(text)}", highlight=False)
