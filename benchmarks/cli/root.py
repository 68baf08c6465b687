"""The `cl-adapters` command: every command and its name, in the order in which the help shows them."""

from __future__ import annotations

import errno
import os
import sys
import warnings
from collections.abc import Callable, Mapping

import typer

from cl_adapters.benchmarks.cli import (
    index,
    index_evaluate,
    instruct,
    listing,
    pool,
    pool_exchange,
    pool_life,
    predict,
    run,
)
from cl_adapters.benchmarks.cli._console import print_error
from cl_adapters.errors import ClAdaptersError


def _group(commands: Mapping[str, Callable[..., None]], help: str) -> typer.Typer:
    made = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=help)
    for name, command in commands.items():
        made.command(name)(command)
    return made


app = _group(
    {
        "run": run.run_command,
        "resume": run.resume_command,
        "report": run.report_command,
        "predict": predict.predict_command,
        "instruct": instruct.instruct_command,
        "list": listing.list_command,
    },
    help="Continual learning with adapters on frozen pre-trained transformers.",
)
app.add_typer(
    _group(
        {
            "ls": pool.ls_command,
            "show": pool.show_command,
            "verify": pool.verify_command,
            "rm": pool.rm_command,
            "forget": pool.forget_command,
            "gc": pool.gc_command,
            "tag": pool.tag_command,
            "rename": pool.rename_command,
            "copy": pool.copy_command,
            "export": pool_exchange.export_command,
            "import": pool_exchange.import_command,
            "create": pool_life.create_command,
            "merge": pool_life.merge_command,
            "compress": pool_life.compress_command,
        },
        help="Adapters on disk: make, list, check, merge, compress, forget, exchange.",
    ),
    name="pool",
)
app.add_typer(
    _group(
        {
            "build": index.build_command,
            "query": index.query_command,
            "stats": index.stats_command,
            "evaluate": index_evaluate.evaluate_command,
        },
        help="Which adapters of a pool know an input: build, query, describe.",
    ),
    name="index",
)


def main() -> None:
    """All commands: the package's own errors, and those of the system, become one line and exit code 2."""
    warnings.showwarning = lambda message, *place: print_error(str(message), "warning")
    try:
        try:
            app()
        finally:
            sys.stdout.flush()  # a full disk is found here, not by the interpreter when it ends
    except ClAdaptersError as error:
        print_error(str(error))
        sys.exit(2)
    except OSError as error:
        _silence_output()
        if error.errno == errno.EPIPE:
            sys.exit(1)
        print_error(f"{error.strerror or error}" + (f": {error.filename}" if error.filename else ""))
        sys.exit(2)


def _silence_output() -> None:
    """Let nothing be flushed again where it could not be written: the interpreter would say so once more."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
