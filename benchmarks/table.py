"""Many seeds of several strategies, in parallel processes of one thread each, and one table.

    python -m cl_adapters.benchmarks.table --benchmarks digits glyphs --seeds 0 1 2 3 4 --out runs/table

Finished runs found under ``--out`` are not run again and interrupted ones are resumed, so the command can be stopped
and repeated.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from rich.console import Console

from cl_adapters.benchmarks.comparison import summarise, to_markdown
from cl_adapters.benchmarks.results import read

STRATEGIES = ("sequential", "simple_cil", "mos", "joint")


def main() -> int:
    """Run what is missing, then print the table as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--benchmarks", nargs="+", default=["digits"], help="names, or NAME:ARGUMENT")
    parser.add_argument("--strategies", nargs="+", default=list(STRATEGIES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="as in `cl-adapters run`")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes at a time")
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs")
    options = parser.parse_args()
    jobs = [
        (strategy, benchmark, seed, options.out / f"{strategy}-{benchmark.replace(':', '_').replace('/', '_')}-s{seed}")
        for benchmark in options.benchmarks
        for seed in options.seeds
        for strategy in options.strategies
    ]
    with ThreadPoolExecutor(options.jobs) as pool:
        failures = [line for line in pool.map(lambda job: _run(job, options.set), jobs) if line]
    for line in failures:
        print(line, file=sys.stderr)
    runs = [read(out) for *_, out in jobs if (out / "results.json").is_file()]
    Console().print(to_markdown(summarise(runs)), soft_wrap=True, markup=False, highlight=False)
    return bool(failures)


def _run(job: tuple[str, str, int, Path], settings: list[str]) -> str | None:
    """Run or resume one experiment in a process of its own; return what went wrong, if anything."""
    strategy, benchmark, seed, out = job
    command = [sys.executable, "-m", "cl_adapters.benchmarks.cli"]
    if out.exists():
        command += ["resume", str(out), "--threads", "1"]
    else:
        command += ["run", "--strategy", strategy, "--benchmark", benchmark, "--seed", str(seed), "--out", str(out)]
        command += ["--threads", "1", *(word for pair in settings for word in ("--set", pair))]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    print(f"{'done' if done.returncode == 0 else 'FAILED'} {out}", file=sys.stderr, flush=True)
    return None if done.returncode == 0 else f"{out}: {done.stderr.strip().splitlines()[-1:] or done.returncode}"


if __name__ == "__main__":
    sys.exit(main())
