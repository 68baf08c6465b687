r"""Many seeds of several strategies, in parallel processes of one thread each, and one table.

    python -m cl_adapters.benchmarks.bench.table --benchmarks digits glyphs --seeds 0 1 2 3 4 --out runs/table
    python -m cl_adapters.benchmarks.bench.table --benchmarks glyphs glyphs:200,tasks=20 \
        --strategies mos lae lae:adapter=lora lae:adapter=prefix --out runs/table

Strategies and benchmarks are written NAME, NAME:KEY=VALUE,KEY=VALUE or, for benchmarks that take an argument,
NAME:ARGUMENT,KEY=VALUE; keys and values are those of `cl-adapters run --set`, without the "benchmark." in front.
Finished runs found under ``--out`` are not run again and interrupted ones are resumed, so the command can be stopped
and repeated.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from cl_adapters.benchmarks.bench._command import RunsFolder, command_of
from cl_adapters.benchmarks.bench.comparison import summarise, to_markdown
from cl_adapters.benchmarks.results.results import read
from cl_adapters.errors import ConfigError

ROWS = ("simple_cil", "sequential", "ranpac", "lae", "sema", "mos", "joint")
"""How rows are sorted, from the cheapest to the upper bound; which there are, the registry knows."""
CORES = os.cpu_count() or 1
_KEY = r"[A-Za-z_][\w.]*="


@dataclass(frozen=True)
class Choice:
    """A strategy or a benchmark with settings, as written on the command line.

    Attributes:
        text: as written.
        name: what `cl-adapters run` gets for --strategy or --benchmark, an argument included.
        settings: (key, value) for --set.
    """

    text: str
    name: str
    settings: tuple[tuple[str, str], ...] = ()

    @classmethod
    def parse(cls, text: str) -> Choice:
        """Read NAME, NAME:ARGUMENT, NAME:KEY=VALUE, or either with further ,KEY=VALUE.

        A comma separates only where KEY= follows, so values may be lists ("blocks=[4,5]").

        Raises:
            ConfigError: no name, or a key that is given twice.
        """
        head, *rest = re.split(rf",(?={_KEY})", text)
        name, _, first = head.partition(":")
        if re.match(_KEY, first):
            head, rest = name, [first, *rest]
        settings = [(key, value) for key, _, value in (pair.partition("=") for pair in rest)]
        keys = [key for key, _ in settings]
        twice = sorted({key for key in keys if keys.count(key) > 1})
        if not name or "=" in name or twice:
            problem = f"{twice[0]} is given twice" if twice else "there is no name in front"
            raise ConfigError(f"{text!r}: {problem}; write NAME, NAME:KEY=VALUE or NAME:KEY=VALUE,KEY=VALUE")
        return cls(text, head, tuple(settings))

    @property
    def folder(self) -> str:
        """The text as part of a folder's name."""
        return re.sub(r"[^\w.=-]+", "_", self.text, flags=re.ASCII).strip("_")


@dataclass(frozen=True)
class Job:
    """One run: what, with which seed, where."""

    strategy: Choice
    benchmark: Choice
    seed: int
    out: Path

    def command(self, settings: Sequence[str]) -> list[str]:
        """The words after `cl-adapters`: begin the run, or go on with it where its folder exists; own settings win."""
        if self.out.exists():
            return ["resume", str(self.out), "--threads", "1"]
        own = dict(self.strategy.settings)
        own |= {f"benchmark.{key.removeprefix('benchmark.')}": value for key, value in self.benchmark.settings}
        pairs = [pair for pair in settings if pair.partition("=")[0] not in own]
        pairs += [f"{key}={value}" for key, value in own.items()]
        words = ["run", "--strategy", self.strategy.name, "--benchmark", self.benchmark.name]
        words += ["--seed", str(self.seed), "--out", str(self.out), "--threads", "1"]
        return words + [word for pair in pairs for word in ("--set", pair)]


def jobs(strategies: Sequence[str], benchmarks: Sequence[str], seeds: Sequence[int], out: Path) -> list[Job]:
    """All combinations, each with a folder of its own under ``out``.

    Raises:
        ConfigError: a text that cannot be read, or two that would share a folder.
    """
    found = [
        Job(strategy, benchmark, seed, out / f"{strategy.folder}-{benchmark.folder}-s{seed}")
        for benchmark in map(Choice.parse, benchmarks)
        for seed in seeds
        for strategy in map(Choice.parse, strategies)
    ]
    places: dict[Path, Job] = {}
    for job in found:
        other = places.setdefault(job.out, job)
        if other is not job:
            pair = [f"{one.strategy.text} on {one.benchmark.text}, seed {one.seed}" for one in (other, job)]
            raise ConfigError(f"{pair[0]!r} and {pair[1]!r} would both be written to {job.out}; leave one of them out")
    return found


def known_strategies() -> list[str]:
    """All registered strategies, in the order of the rows of a full table; those without a place come before joint."""
    from cl_adapters.strategies.base import strategies

    return sorted(strategies.names(), key=lambda name: ROWS.index(name) if name in ROWS else ROWS.index("joint") - 0.5)


def run_all(todo: Sequence[Job], settings: Sequence[str] = (), at_a_time: int = 1) -> bool:
    """Run what is missing, then print the table as Markdown; false where a run failed."""
    with ThreadPoolExecutor(at_a_time) as pool:
        failures = [line for line in pool.map(lambda job: _run(job, settings), todo) if line]
    for line in failures:
        print(line, file=sys.stderr)
    runs = [read(job.out) for job in todo if (job.out / "results.json").is_file()]
    Console().print(to_markdown(summarise(runs)), soft_wrap=True, markup=False, highlight=False)
    return not failures


def main(
    out: RunsFolder,
    benchmarks: Annotated[list[str] | None, typer.Option(help="Such as digits, glyphs:200,tasks=20.")] = None,
    strategies: Annotated[
        list[str] | None, typer.Option(help="Such as mos, lae:adapter=lora; default all that are registered.")
    ] = None,
    seeds: Annotated[list[int] | None, typer.Option(help="Default 0 to 4.")] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="For all runs, as in `cl-adapters run`.")
    ] = None,
    at_a_time: Annotated[int, typer.Option("--jobs", help="Processes at a time.")] = CORES,
) -> None:
    """Read the words; run; exit code 1 where a run failed."""
    try:
        todo = jobs(strategies or known_strategies(), benchmarks or ["digits"], seeds or range(5), out)
    except ConfigError as error:
        raise typer.BadParameter(str(error)) from error
    if not run_all(todo, settings or (), at_a_time):
        raise typer.Exit(1)


def _run(job: Job, settings: Sequence[str]) -> str | None:
    """Run or resume one experiment in a process of its own; return what went wrong, if anything."""
    command = [sys.executable, "-m", "cl_adapters.benchmarks.cli", *job.command(settings)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    print(f"{'done' if done.returncode == 0 else 'FAILED'} {job.out}", file=sys.stderr, flush=True)
    return None if done.returncode == 0 else f"{job.out}: {done.stderr.strip().splitlines()[-1:] or done.returncode}"


if __name__ == "__main__":
    command_of(main, __doc__)()
