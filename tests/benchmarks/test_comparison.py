"""Tables over several runs: grouping, means, deviations, and what must not be averaged."""

from typing import Any

import pytest

from cl_adapters.benchmarks.bench.comparison import Stat, summarise, to_markdown
from cl_adapters.benchmarks.results.results import BackboneInfo, Passes, Results, Seconds
from cl_adapters.errors import DataError


def run(seed: int, accuracy: float, strategy: str = "mos", merge: str = "paper", **changes: Any) -> Results:
    """A run of one task with that accuracy."""
    values: dict[str, Any] = {
        "strategy": strategy,
        "benchmark": "digits",
        "backbone": BackboneInfo(name="tiny", fingerprint="f" * 64),
        "seed": seed,
        "class_names": ("a", "b"),
        "class_order": (0, 1),
        "task_classes": ((0,), (1,)),
        "test_counts": (10, 10),
        "accuracy_matrix": ((100.0, None), (accuracy, accuracy)),
        "backbone_passes_per_image": Passes(per_evaluation=(1.0, 2.0), overall=1.5),
        "trainable_parameters": (1000, 2000),
        "stored_bytes_per_task": (500, 700),
        "seconds_per_task": (Seconds(train=2.0, eval=1.0), Seconds(alignment=float(seed))),
        "cpu_seconds_per_task": (Seconds(train=10.0), Seconds()),
        "started": "2026-01-01T10:00:00+00:00",
        "finished": "2026-01-01T10:01:00+00:00",
        "config": {
            "seed": seed,
            "strategy": {"name": strategy, "merge": merge},
            "backbone": {"weights": f"/tmp/{seed}"},
        },
        "adapters": (1, 2),
        "adapter_parameters": (100, 200),
        "versions": {},
        "hardware": {},
    }
    return Results(**(values | changes))


def test_mean_and_sample_deviation_over_seeds() -> None:
    # A_last 80, 90, 94: mean 88, deviations -8, 2, 6, variance (64 + 4 + 36) / 2 = 52
    (row,) = summarise([run(2, 80.0), run(0, 90.0), run(1, 94.0)])
    assert row.seeds == (0, 1, 2)
    assert row.variant == ""
    assert row.a_last.mean == 88.0
    assert row.a_last.std == pytest.approx(52**0.5)
    assert row.a_bar.mean == pytest.approx((90 + 95 + 97) / 3)
    assert row.forgetting.mean == pytest.approx(12.0)
    assert (row.trainable_parameters.mean, row.stored_bytes.mean) == (2000.0, 1200.0)
    assert row.adapters == Stat(2.0, 0.0)
    assert row.passes_per_image == Stat(1.5, 0.0)
    assert row.learning_seconds == Stat(3.0, 1.0)
    assert row.cpu_seconds.mean == 10.0


def test_one_run_has_no_deviation_and_missing_values_no_mean() -> None:
    (row,) = summarise([run(0, 80.0)])
    assert row.a_last == Stat(80.0, None)
    gap = run(1, 80.0, accuracy_matrix=((None, None), (80.0, 80.0)))
    (row,) = summarise([run(0, 80.0), gap])
    assert row.a_bar == Stat(None, None)
    assert row.a_last == Stat(80.0, 0.0)


def test_groups_by_benchmark_and_strategy_in_order_of_appearance() -> None:
    rows = summarise([run(0, 80.0), run(0, 50.0, "sequential"), run(1, 82.0), run(0, 70.0, benchmark="glyphs")])
    assert [(row.benchmark, row.strategy, row.seeds) for row in rows] == [
        ("digits", "mos", (0, 1)), ("digits", "sequential", (0,)), ("glyphs", "mos", (0,)),
    ]  # fmt: skip
    assert {row.variant for row in rows} == {""}, "each is the only variant of its strategy on its benchmark"


def test_other_options_backbones_or_lengths_are_rows_of_their_own() -> None:
    other = BackboneInfo(name="deit", fingerprint="e" * 64)
    rows = summarise([run(0, 80.0), run(0, 85.0, merge="released"), run(0, 60.0, backbone=other)])
    assert [row.variant for row in rows] == [
        "backbone=tiny ffffffff, merge=paper", "backbone=tiny ffffffff, merge=released",
        "backbone=deit eeeeeeee, merge=paper",
    ]  # fmt: skip


def with_adapter(seed: int, strategy: str, **adapter: Any) -> Results:
    return run(seed, 80.0, strategy, config={"seed": seed, "strategy": {"name": strategy, "adapter": adapter}})


def test_adapter_types_are_rows_of_their_own_named_by_the_type() -> None:
    rows = summarise(
        [
            with_adapter(0, "mos", type="bottleneck", bottleneck=16),
            with_adapter(0, "mos", type="lora", rank=5),
            with_adapter(1, "mos", type="lora", rank=5),
            with_adapter(0, "joint", type="lora", rank=5),
        ]
    )
    found = [(row.strategy, row.variant, row.seeds) for row in rows]
    assert found == [("mos", "", (0,)), ("mos", "lora", (0, 1)), ("joint", "lora", (0,))]
    assert "| digits | mos (lora) | 0–1 |" in to_markdown(rows)
    two = summarise([with_adapter(0, "mos", type="lora", rank=5), with_adapter(0, "mos", type="lora", rank=9)])
    assert [row.variant for row in two] == ["lora, adapter.rank=5", "lora, adapter.rank=9"]
    unknown = summarise([with_adapter(0, "no-such-strategy", type="bottleneck")])
    assert unknown[0].variant == "bottleneck", "a strategy that is not installed has no default to leave out"


def test_one_benchmark_with_other_settings_is_another_for_all_strategies() -> None:
    def tasks(seed: int, strategy: str, number: int) -> Results:
        return run(seed, 80.0, strategy, config={"strategy": {"name": strategy}, "benchmark": {"tasks": number}})

    rows = summarise([tasks(0, "mos", 10), tasks(0, "joint", 10), tasks(0, "mos", 20), tasks(1, "mos", 10)])
    found = [(row.benchmark, row.benchmark_variant, row.strategy, row.variant, row.seeds) for row in rows]
    assert found == [
        ("digits", "tasks=10", "mos", "", (0, 1)), ("digits", "tasks=10", "joint", "", (0,)),
        ("digits", "tasks=20", "mos", "", (0,)),
    ]  # fmt: skip
    assert "| digits (tasks=20) | mos |" in to_markdown(rows)


def test_runs_recorded_before_an_option_existed_share_the_row_of_its_default() -> None:
    from cl_adapters.benchmarks.run.experiment import resolve

    new = resolve("mos", "digits").to_plain()
    strategy = {key: value for key, value in new["strategy"].items() if key not in ("cached_views", "ensemble")}
    old = new | {"strategy": strategy}
    (row,) = summarise([run(0, 80.0, config=new), run(1, 90.0, config=old)])
    assert (row.seeds, row.variant) == ((0, 1), "")
    other = old | {"strategy": strategy | {"ensemble": False}}
    assert len(summarise([run(0, 80.0, config=new), run(1, 90.0, config=other)])) == 2


def test_adapters_that_one_run_did_not_count_have_no_mean() -> None:
    (row,) = summarise([run(0, 80.0), run(1, 80.0, adapters=None, adapter_parameters=None)])
    assert row.adapters == Stat(None, None)
    (line,) = to_markdown([row]).splitlines()[2:]
    assert line.split("|")[9].strip() == "–"
    (fraction,) = summarise([run(0, 80.0), run(1, 80.0, adapters=(1, 3))])
    assert to_markdown([fraction]).splitlines()[2].split("|")[9].strip() == "2.5"


def test_the_same_seed_twice_is_an_error() -> None:
    with pytest.raises(DataError, match="mos on digits: seed 3 is there 2 times"):
        summarise([run(3, 80.0), run(3, 81.0)])


def test_markdown() -> None:
    text = to_markdown(summarise([run(seed, 80.0 + seed, benchmark="a|b") for seed in (0, 1, 2, 5)]))
    heading, rule, line = text.splitlines()
    assert heading.startswith("| benchmark | strategy | seeds | tasks | A-bar, % |")
    assert rule.count("|") == heading.count("|")
    assert rule.startswith("| --- | --- | --- | ---: |")
    assert line.startswith(
        "| a\\|b | mos | 0–2, 5 | 2 | 91.00 ± 1.08 | 82.00 ± 2.16 | 18.00 ± 2.16 | 2 k | 2 | 1.50 ± 0.00 | 1.2 kB |"
    )
