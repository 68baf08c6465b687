"""What the command lines of the benches have in common: options of several words, and words from a fixed choice."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

Jobs = Annotated[int, typer.Option(help="Processes at a time.")]
RunsFolder = Annotated[Path, typer.Option(help="Folder of the runs.")]


class _ManyWords(TyperCommand):
    """Options that may be repeated also take several words at once: ``--seeds 0 1 2``. There are no other words."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        repeatable = {name for option in self.params if getattr(option, "multiple", False) for name in option.opts}
        repeated: list[str] = []
        current, taken = "", False
        for word in args:
            if word.startswith("--"):
                current, equals, _ = word.partition("=")
                taken = bool(equals)
                repeated.append(word)
            else:
                repeated += [current, word] if taken and current in repeatable else [word]
                taken = True
        return super().parse_args(ctx, repeated)


def command_of(main: Callable[..., None], help: str | None) -> typer.Typer:
    """A bench as a command; ``help``, the docstring of its module, is printed line by line as it is written."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
    paragraphs = (help or "").split("\n\n")
    app.command(cls=_ManyWords, help="\n\n".join(f"\b\n{text}" for text in paragraphs))(main)
    return app


def one_of(words: Iterable[str]) -> Callable[[Any], Any]:
    """Callback of an option: refuses other words than these."""
    known = list(words)

    def check(value: Any) -> Any:
        for word in value if isinstance(value, (list, tuple)) else [value]:
            if word is not None and word not in known:
                raise typer.BadParameter(f"{word!r} is not one of {', '.join(known)}")
        return value

    return check
