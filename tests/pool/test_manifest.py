"""The manifest's schema, its migrations, and records as plain values."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from cl_adapters.errors import PoolError
from cl_adapters.pool import AdapterPool, PoolClass, Record, manifest
from cl_adapters.pool.record import record_from_plain, record_to_plain

Make = Callable[..., dict[str, Tensor]]

NEW = ("tags", "parents", "merge", "compression")
"""What schema 1 added."""


def to_schema_0(pool: AdapterPool) -> bytes:
    path = pool.path / "manifest.json"
    plain = json.loads(path.read_text())
    for record in plain["records"]:
        for key in NEW:
            del record[key]
    plain["schema_version"] = 0
    path.write_text(json.dumps(plain))
    return path.read_bytes()


def version(pool: AdapterPool) -> Any:
    return json.loads((pool.path / "manifest.json").read_text())["schema_version"]


def test_every_older_schema_has_a_migration() -> None:
    assert sorted(manifest.migrations) == list(range(manifest.SCHEMA))


def test_an_older_pool_is_read_as_it_is_and_written_anew(pool: AdapterPool) -> None:
    pool.tag("task-000", remove=["even"])
    records = pool.records
    written = to_schema_0(pool)
    old = AdapterPool.open(pool.path)
    assert old.records == records
    assert old.tensors("task-000")
    assert old.verify().ok
    assert (pool.path / "manifest.json").read_bytes() == written  # reading changes nothing
    assert old.migrate() == 0
    assert version(pool) == 1
    assert AdapterPool.open(pool.path).records == records
    assert old.migrate() == 1


def test_any_change_writes_the_current_schema(pool: AdapterPool) -> None:
    to_schema_0(pool)
    AdapterPool.open(pool.path).tag("task-001", add=["new"])
    assert version(pool) == 1
    assert pool.get("task-001").tags == ("new",)
    assert pool.get("task-000").tags == ()


def test_an_older_pool_keeps_its_broken_records(pool: AdapterPool) -> None:
    to_schema_0(pool)
    path = pool.path / "manifest.json"
    plain = json.loads(path.read_text())
    plain["records"] += [7, {"id": "half"}]
    path.write_text(json.dumps(plain))
    old = AdapterPool.open(pool.path)
    assert old.ids == ("task-000", "task-001")
    assert [broken.id for broken in old.broken] == ["record 2", "half"]
    old.migrate()
    assert json.loads(path.read_text())["records"][2] == 7


def test_migrations_follow_each_other(pool: AdapterPool, monkeypatch: pytest.MonkeyPatch) -> None:
    def second(content: dict[str, Any]) -> dict[str, Any]:
        assert all(key in record for record in content["records"] for key in NEW)  # the first came before
        return content | {"records": [record | {"benchmark": "migrated"} for record in content["records"]]}

    to_schema_0(pool)
    monkeypatch.setattr(manifest, "SCHEMA", 2)
    monkeypatch.setitem(manifest.migrations, 1, second)
    assert {record.benchmark for record in AdapterPool.open(pool.path).records} == {"migrated"}


def test_an_older_folder_is_imported(pool: AdapterPool, tmp_path: Path) -> None:
    folder = pool.export_to(tmp_path / "one", "task-001")
    plain = json.loads((folder / "record.json").read_text())
    for key in NEW:
        del plain["records"][0][key]
    (folder / "record.json").write_text(json.dumps(plain | {"schema_version": 0}))
    assert pool.import_from(folder, id="again").labels == pool.get("task-001").labels


def test_a_record_is_the_same_after_json(pool: AdapterPool, tensors: Make) -> None:
    full = Record(
        id="a.b-c_0",
        adapter={"type": "bottleneck", "bottleneck": 2},
        blocks=(0, 11),
        classes=(PoolClass(label=-5, name="Ä „x“"), PoolClass(label=2**63 - 1)),
        task=3,
        adapter_sha="0" * 64,
        knowledge_sha="f" * 64,
        num_parameters=12,
        tags=("a b", "c"),
        parents=("x", "y"),
        merge={"method": "ties", "density": 0.2, "dropped": [1, 2]},
        compression="int8",
        benchmark="digits",
        metrics={"accuracy": 0.1 + 0.2},
        created="2025-01-01T00:00:00+00:00",
        library_version="0.1.0",
    )
    assert record_from_plain(json.loads(json.dumps(record_to_plain(full)))) == full


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({"id": "A"}, "cannot be an adapter's id"),
        ({"merge": {"base": object()}}, "merge has to be plain JSON"),
        ({"metrics": {"accuracy": float("nan")}}, "is nan"),
        ({"tags": ("a", "a")}, "tag 'a' is there twice"),
        ({"benchmark": "x" * 1001}, "1001 characters"),
        ({"compression": "fp16"}, "without an adapter"),
    ],
)
def test_records_check_themselves(values: dict[str, Any], match: str) -> None:
    plain: dict[str, Any] = {
        "id": "x",
        "adapter": None,
        "blocks": (),
        "classes": (),
        "task": None,
        "adapter_sha": None,
        "knowledge_sha": None,
        "num_parameters": 0,
        "created": "now",
        "library_version": "0",
    }
    Record(**plain)
    with pytest.raises(PoolError, match=match):
        Record(**plain | values)
