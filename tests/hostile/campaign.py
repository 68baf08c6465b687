"""Damage folders by the thousand and count what readers make of them.

    python tests/hostile/campaign.py --mutants 2000 --seed 0

Prints a table per kind of folder, then every distinct failure with the damage that led to it; exit code 1 if there is
any. The same seed, release of Hypothesis and folders give the same mutants.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
import types
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a damaged name of a backbone asks no hub
ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
sys.modules["tests"] = types.ModuleType("tests")  # avalanche-lib installs a package of that name
sys.modules["tests"].__path__ = [str(ROOT / "tests")]

from hypothesis import HealthCheck, Phase, given, seed, settings

from tests.hostile.mutations import Plan, plans
from tests.hostile.readers import BAD, CRASH, KINDS, OUTCOMES, Kind, Place, Verdict, judge, tally

SHARES = {"pool": 0.2, "model": 0.2, "index": 0.15, "run": 0.1, "instruct run": 0.05}
"""Of the mutants; the other kinds share the rest evenly."""


def mutants_of(kind: str, mutants: int) -> int:
    """How many of all mutants are of a kind."""
    rest = (1 - sum(SHARES.values())) / (len(KINDS) - len(SHARES))
    return max(1, round(mutants * SHARES.get(kind, rest)))


def attack(kind: Kind, mutants: int, number: int) -> list[tuple[Plan, Verdict]]:
    """Judge so many mutants of a kind, drawn from a seed."""
    judged: list[tuple[Plan, Verdict]] = []

    @seed(number)
    @settings(
        max_examples=mutants,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(plans(kind.folders[0]))
    def drawn(plan: Plan) -> None:
        judged.append((plan, judge(kind, plan)))

    drawn()
    return judged


def failures(judged: list[tuple[Plan, Verdict]]) -> dict[str, tuple[int, Plan, Verdict]]:
    """The distinct failures: how often, and the one with the fewest changes."""
    found: dict[str, tuple[int, Plan, Verdict]] = {}
    for plan, verdict in judged:
        if not verdict.bad:
            continue
        key = f"{verdict.outcome}: {verdict.where}"
        count, least, its = found.get(key, (0, plan, verdict))
        if len(plan.mutations) < len(least.mutations):
            least, its = plan, verdict
        found[key] = (count + 1, least, its)
    return found


def main() -> int:
    """Run the campaign; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mutants", type=int, default=2000, help="of all kinds together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kind", action="append", choices=sorted(KINDS), help="only these; may be repeated")
    chosen = parser.parse_args()
    print(f"seed {chosen.seed}")
    print(f"{'folder':20}{'mutants':>9}" + "".join(f"{outcome:>24}" for outcome in OUTCOMES) + f"{'seconds':>9}")
    everything: list[tuple[Plan, Verdict]] = []
    told: list[str] = []
    with tempfile.TemporaryDirectory() as scratch:
        place = Place(Path(scratch))
        for name in chosen.kind or KINDS:
            started = time.perf_counter()
            judged = attack(place.kind(name), mutants_of(name, chosen.mutants), chosen.seed)
            everything += judged
            _row(name, judged, time.perf_counter() - started)
            for key, (count, plan, verdict) in failures(judged).items():
                told.append(
                    f"{name}, {count} times: {key}\n    {verdict.why}\n    after: {'; '.join(verdict.done)}\n    {plan}"
                )
    _row("all", everything, None)
    for text in told:
        print(f"\n{text}")
    counts = tally([verdict for _, verdict in everything])
    return 1 if counts[BAD] or counts[CRASH] else 0


def _row(name: str, judged: list[tuple[Plan, Verdict]], seconds: float | None) -> None:
    counts = tally([verdict for _, verdict in judged])
    numbers = "".join(f"{counts[outcome]:24}" for outcome in OUTCOMES)
    print(f"{name:20}{len(judged):9}{numbers}" + ("" if seconds is None else f"{seconds:9.1f}"), flush=True)


if __name__ == "__main__":
    sys.exit(main())
