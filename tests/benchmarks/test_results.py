"""results.json: the schema, its documentation, and what happens to files that do not follow it."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cl_adapters.benchmarks import results as module
from cl_adapters.benchmarks.results.results import (
    BackboneInfo,
    Expansion,
    Passes,
    Results,
    Routing,
    Seconds,
    read,
    write,
)
from cl_adapters.errors import ConfigError, StorageError
from cl_adapters.strategies.base import Expansion as StrategyExpansion

DOCUMENT = Path(__file__).parents[2] / "docs" / "results.md"


def make(**changes: Any) -> Results:
    """Results of two tasks with two classes each; figures by hand: A_t = 90, (10*80 + 30*60)/40 = 65."""
    values: dict[str, Any] = {
        "strategy": "mos",
        "benchmark": "digits",
        "backbone": BackboneInfo(name="vit_glyph_tiny", fingerprint="abc"),
        "seed": 3,
        "class_names": ("zero", "one", "two", "drei \u4e09"),
        "class_order": (2, 0, 1, 3),
        "task_classes": ((2, 0), (1, 3)),
        "test_counts": (10, 30),
        "accuracy_matrix": np.array([[90.0, np.nan], [80.0, 60.0]]),
        "backbone_passes_per_image": Passes(per_evaluation=(1.0, 1.5), overall=1.4),
        "trainable_parameters": (100, 120),
        "stored_bytes_per_task": (4000, 4100),
        "seconds_per_task": (Seconds(train=2.0, eval=0.5), Seconds(train=3.0, statistics=0.25, alignment=1.0)),
        "cpu_seconds_per_task": (Seconds(train=4.0), Seconds(train=6.0)),
        "started": "2026-01-01T10:00:00+00:00",
        "finished": "2026-01-01T10:01:00+00:00",
        "config": {"strategy": {"merge": "paper"}},
        "versions": {"python": "3.11"},
        "hardware": {"cpu": "x", "threads": 1},
        "licence": "public domain",
        "routing": Routing(
            adapters=("0", "1"), adapter_tasks=(0, 1), counts=((9, 1), (0, 30)), right_share=(100.0, 97.5)
        ),
        "adapters": (1, 2),
        "adapter_parameters": (90, 135),
        "adapters_per_block": ({"8": 1, "9": 1}, {"8": 1, "9": 2}),
    }
    return Results(**(values | changes))


def added(task: int, score: float | None = 2.5) -> Expansion:
    """Slot 1 at block 9."""
    return Expansion(task=task, block=9, slot=1, score=score, threshold=2.0, scan=0, batch=3)


def stored(tmp_path: Path, **changes: Any) -> Path:
    """A written file with some top-level keys replaced (or, with ..., removed)."""
    path = write(make(), tmp_path / "results.json")
    plain = json.loads(path.read_text())
    plain.update(changes)
    path.write_text(json.dumps({key: value for key, value in plain.items() if value is not ...}))
    return path


def test_figures_follow_from_the_matrix() -> None:
    run = make()
    assert run.a_curve == (90.0, 65.0)
    assert (run.a_bar, run.a_last) == (77.5, 65.0)
    assert run.forgetting_per_task == (10.0,)
    assert (run.forgetting, run.backward_transfer) == (10.0, -10.0)
    assert run.seconds == Seconds(train=5.0, statistics=0.25, alignment=1.0, eval=0.5)
    assert run.seconds.total == 6.75
    assert run.cpu_seconds.train == 10.0
    assert run.accuracy_matrix == ((90.0, None), (80.0, 60.0))
    assert np.isnan(run.matrix[0, 1])


def test_write_then_read_gives_the_same(tmp_path: Path) -> None:
    run = make(expansions=(added(task=1),))
    path = write(run, tmp_path / "results.json")
    assert read(path) == run
    assert read(tmp_path) == run, "a run folder is as good as the file"
    assert [entry.name for entry in tmp_path.iterdir()] == ["results.json"], "no temporary file stays"


def test_file_is_strict_json_with_every_field(tmp_path: Path) -> None:
    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    plain = json.loads(write(make(), tmp_path / "results.json").read_text(), parse_constant=refuse)
    assert list(plain) == [field.name for field in dataclasses.fields(Results)]
    assert plain["accuracy_matrix"] == [[90.0, None], [80.0, 60.0]]
    assert plain["schema_version"] == 2
    assert plain["backbone"] == {"name": "vit_glyph_tiny", "fingerprint": "abc"}
    assert set(plain["seconds"]) == {"train", "statistics", "alignment", "eval"}


def test_one_task(tmp_path: Path) -> None:
    one = make(
        task_classes=((2, 0),),
        test_counts=(10,),
        accuracy_matrix=((50.0,),),
        backbone_passes_per_image=Passes(per_evaluation=(None,), overall=None),
        trainable_parameters=(1,),
        stored_bytes_per_task=(1,),
        seconds_per_task=(Seconds(),),
        cpu_seconds_per_task=(Seconds(),),
        routing=None,
        adapters=(0,),
        adapter_parameters=(0,),
        adapters_per_block=({},),
    )
    assert (one.forgetting, one.forgetting_per_task, one.a_bar) == (None, (), 50.0)
    assert read(write(one, tmp_path / "results.json")) == one


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schema_version": 3}, "schema 3.*upgrade"),
        ({"schema_version": "2"}, "no schema_version"),
        ({"schema_version": 0}, "schema_version is 0"),
        ({"a_bar": ...}, "has no a_bar"),
        ({"seed": ..., "config": ...}, "has no seed, config"),
        ({"a_barr": 1.0}, "a_barr"),
        ({"seed": "three"}, "seed: .*integer.*'three'"),
        ({"accuracy_matrix": [[90.0, None], [80.0, "sixty"]]}, r"accuracy_matrix\.1\.1"),
        ({"accuracy_matrix": [[90.0], [80.0, 60.0]]}, "2 cells"),
        ({"accuracy_matrix": [[90.0, None], [80.0, 160.0]]}, "percent"),
        ({"test_counts": [10]}, "test_counts has 1 entries, expected one for each of 2"),
        ({"adapters": [1]}, "adapters has 1 entries, expected one for each of 2"),
        ({"adapter_parameters": [1, 2, 3]}, "adapter_parameters has 3 entries"),
        ({"adapters_per_block": [{}]}, "adapters_per_block has 1 entries"),
        ({"adapters_per_block": [{"9": "one"}, {}]}, r"adapters_per_block\.0\.9"),
        ({"adapters": ...}, "has no adapters"),
        ({"expansions": [{"block": 9}]}, r"expansions\.0\.task"),
        ({"class_names": ["a"]}, "have no name"),
        ({"backbone": {"name": "x"}}, "backbone.fingerprint"),
        ({"a_last": 99.0}, "altered: a_last is 99.0, the rest gives 65.0"),
        ({"a_curve": [90.0, None]}, "altered: a_curve"),
        ({"seconds": {"train": 1.0}}, "altered: seconds"),
    ],
)
def test_bad_files_say_what_is_wrong(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    path = stored(tmp_path, **changes)
    with pytest.raises(StorageError, match=message) as caught:
        read(path)
    assert str(path) in str(caught.value)


def test_a_file_of_schema_1_is_read_with_what_it_does_not_tell_as_none(tmp_path: Path) -> None:
    gone = dict.fromkeys(("adapters", "adapter_parameters", "adapters_per_block"), ...)
    path = stored(tmp_path, schema_version=1, **gone)
    assert json.loads(path.read_text())["schema_version"] == 1
    run = read(path)
    assert run == make(adapters=None, adapter_parameters=None, adapters_per_block=None)
    assert (run.schema_version, run.expansions) == (2, None)
    again = write(run, tmp_path / "again.json")
    assert json.loads(again.read_text())["adapters"] is None
    assert read(again) == run
    stored(tmp_path, schema_version=1, **gone, seed=...)
    with pytest.raises(StorageError, match="has no seed"):
        read(path)


def test_expansions_are_those_of_finished_tasks_and_as_strategies_tell_them() -> None:
    with pytest.raises(ValueError, match=r"expansions name the tasks \[2\], but only 0..1 are finished"):
        make(expansions=(added(task=1), added(task=2)))
    told = [field.name for field in dataclasses.fields(StrategyExpansion)]
    assert told == [field.name for field in dataclasses.fields(Expansion)]


def test_missing_broken_and_lax_json(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="missing"):
        read(tmp_path)
    path = tmp_path / "results.json"
    for text in ("{", "[]", ""):
        path.write_text(text)
        with pytest.raises(StorageError, match=re.escape(str(path))):
            read(path)
    stored(tmp_path, config={"lr": float("nan")})
    with pytest.raises(StorageError, match="NaN is not JSON"):
        read(path)


def test_what_json_cannot_hold_is_refused_before_the_old_file_is_touched(tmp_path: Path) -> None:
    path = write(make(), tmp_path / "results.json")
    before = path.read_bytes()
    with pytest.raises(ConfigError, match=r"config\.strategy\.lr is nan"):
        write(make(config={"strategy": {"lr": float("nan")}}), path)
    with pytest.raises(ConfigError, match=r"seconds_per_task\[1\]\.train is inf"):
        write(make(seconds_per_task=(Seconds(), Seconds(train=float("inf")))), path)
    with pytest.raises(ConfigError, match="seed"):
        write(make(seed="three"), path)
    assert path.read_bytes() == before


def test_unwritable_place(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot write"):
        write(make(), tmp_path / "file" / "results.json")


def test_a_crash_while_writing_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(make(), tmp_path / "results.json")

    def crash(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("cl_adapters._io.os.fsync", crash)
    with pytest.raises(StorageError, match="disk full"):
        write(make(seed=4), path)
    assert read(path).seed == 3
    assert len(list(tmp_path.iterdir())) == 1


def test_every_field_is_documented_and_nothing_else() -> None:
    def names(cls: Any, prefix: str = "") -> set[str]:
        return {prefix + field.name for field in dataclasses.fields(cls)}

    expected = names(Results) | names(BackboneInfo, "backbone.") | names(Seconds) | names(Routing, "routing.")
    expected |= names(Passes, "backbone_passes_per_image.") | names(Expansion, "expansions.")
    rows = [line.split("|")[1] for line in DOCUMENT.read_text().splitlines() if line.startswith("| `")]
    documented = {name for cell in rows for name in re.findall(r"`([^`]+)`", cell)}
    assert documented == expected
    computed = re.findall(r"`(\w+)`", DOCUMENT.read_text().split("follow from the rest")[0].rsplit("\n\n", 1)[1])
    assert set(computed) == set(module.DERIVED)
