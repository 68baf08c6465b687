"""What is written after each task, and how the rows of all tasks become results."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from cl_adapters.benchmarks.results.results import BackboneInfo
from cl_adapters.benchmarks.run.experiment import resolve
from cl_adapters.benchmarks.run.rows import growth, to_results
from cl_adapters.strategies.base import Expansion


def row(counts: list[list[int]], **more: Any) -> dict[str, Any]:
    """A row of one task, as far as ``to_results`` needs it."""
    seconds = dict.fromkeys(("train", "statistics", "alignment", "eval"), 1.0)
    return {
        "accuracy": [50.0] * len(counts), "routing": counts, "passes": 1.0, "trainable_parameters": 1,
        "stored_bytes": 1, "seconds": seconds, "cpu_seconds": seconds, "started": "", "finished": "", **more,
    }  # fmt: skip


def test_the_right_adapter_is_one_made_in_the_images_task() -> None:
    """Two adapters of task 0, then one of task 1; the first column of the counts is the bare backbone."""
    chosen = resolve("mos", "digits")
    data = chosen.benchmark_config.load(0)
    recorded = {"experiment": chosen.to_plain(), "versions": {}, "hardware": {}}
    first = row([[1, 4, 5]], task_of_slot=[0, 0])
    second = row([[0, 6, 3, 1], [0, 0, 4, 6]], task_of_slot=[0, 0, 1])
    results = to_results([first, second], chosen, data, BackboneInfo(name="x", fingerprint="y"), recorded)
    assert results.routing is not None
    assert results.routing.adapter_tasks == (0, 0, 1)
    assert results.routing.counts == ((6, 3, 1), (0, 4, 6))
    assert results.routing.right_share == (90.0, 75.0)
    assert results.adapters is None, "these rows do not tell"


def test_an_adapter_counts_once_per_block_and_an_endless_score_is_null() -> None:
    """Two sites in block 3, one in block 5; the second adapter is at block 5 only."""
    keys = {0: ["b3.key/a", "b3.key/b", "b3.value/a", "b5.key/a"], 1: ["b5.key/a"]}
    sites = [SimpleNamespace(name=name, block=int(name[1])) for name in ("b3.key", "b3.value", "b5.key")]
    bank = SimpleNamespace(
        sites=sites, blocks=(3, 5), num_slots=2, parameters=lambda: [torch.zeros(2, 4), torch.zeros(5)],
        named_slot=lambda slot: [(key, None) for key in keys[slot]],
    )  # fmt: skip
    model = SimpleNamespace(bank=bank, num_slots=2, task_of_slot=[0, 1])
    added = Expansion(task=1, block=5, slot=1, score=float("inf"), threshold=2.0, scan=0, batch=0)
    found = growth(SimpleNamespace(model=model, expansions=[added]))  # type: ignore[arg-type]
    assert found["adapters_per_block"] == {"3": 1, "5": 2}
    assert (found["adapters"], found["adapter_parameters"]) == (2, 13)
    assert found["expansions"] == [
        {"task": 1, "block": 5, "slot": 1, "score": None, "threshold": 2.0, "scan": 0, "batch": 0}
    ]
