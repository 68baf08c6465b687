"""An index on disk: opened again, stale, damaged, forged."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cl_adapters import AdapterIndex
from cl_adapters.errors import DataError, StorageError, UnknownName
from cl_adapters.index import files, indexes
from tests.index.conftest import QUERIES, MemoryPool, knowledge_of, labels_found

METRICS = ("cosine", "ip", "l2", "mahalanobis")


@pytest.mark.parametrize("backend", indexes.names())
@pytest.mark.parametrize("metric", METRICS)
def test_saved_and_opened(pool: MemoryPool, backend: str, metric: Any) -> None:
    index = AdapterIndex.build(pool, backend=backend, metric=metric, keys="features", per_class=5, seed=3)
    index.remove(["task-002"])
    index.add(["task-002"])
    index.threshold = 0.25
    assert index.save() == pool.path / "index" / "default"
    for mmap in (True, False):
        opened = AdapterIndex.open(None, pool, mmap=mmap, verify=True)
        assert opened.query(QUERIES, 7) == index.query(QUERIES, 7)
        assert opened.config == index.config and opened.stats() == index.stats() and opened.threshold == 0.25
    opened.remove(["task-000"])
    opened.save()
    assert "task-000" not in AdapterIndex.open(None, pool, stale="refresh", mmap=True).query(QUERIES, 1)[9][0].record


def test_opening_a_stale_index(pool: MemoryPool) -> None:
    AdapterIndex.build(pool).save()
    pool.drop("task-004")
    pool.put("task-001", knowledge_of([2, 3], n=5), [2, 3])
    pool.put("later", knowledge_of([40]), [40])
    with pytest.raises(StorageError, match=r"1 added \(later\); 1 removed \(task-004\); 1 altered \(task-001\)"):
        AdapterIndex.open(None, pool)
    with pytest.warns(UserWarning, match="refresh"):
        stale = AdapterIndex.open(None, pool, stale="warn")
    assert stale.query(QUERIES[-1:], 1)[0][0].record == "task-004"
    fresh = AdapterIndex.open(None, pool, stale="refresh")
    assert not fresh.changes() and set(fresh.records) == {record.id for record in pool.records}
    rebuilt = AdapterIndex.build(pool)
    assert labels_found(fresh) == labels_found(rebuilt)
    stale.rebuild()
    assert stale.query(QUERIES, 5) == rebuilt.query(QUERIES, 5)
    with pytest.raises(UnknownName, match="did you mean 'warn'"):
        AdapterIndex.open(None, pool, stale="warm")  # type: ignore[arg-type]


def files_of(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.rglob("*")) if path.is_file()]


@pytest.mark.parametrize("backend", ["exact", "flat", "sq8", "hnsw", "ivf", "ivfpq"])
def test_damaged_files_are_one_clear_error(pool: MemoryPool, backend: str) -> None:
    folder = AdapterIndex.build(pool, backend=backend, metric="mahalanobis").save()
    for path in files_of(folder):
        good = path.read_bytes()
        flipped = bytearray(good)
        flipped[len(good) // 2] ^= 1
        bad: list[bytes | None] = [
            None,
            b"",
            good[: len(good) // 2],
            b"\x80\x04\x95pickle",
            bytes(flipped),
            good + b"0",
        ]
        for content in bad:
            path.unlink() if content is None else path.write_bytes(content)
            if path.name == "index.json" and content == bytes(flipped):
                continue  # may be a bit that nothing depends on
            with pytest.raises(StorageError, match=re.escape(str(folder))):
                AdapterIndex.open(folder, pool)
            path.write_bytes(good)
        path.write_bytes(good)
    (folder / "backend" / "more.npy").write_bytes(b"")
    with pytest.raises(StorageError, match=r"more\.npy"):
        AdapterIndex.open(folder, pool)


@pytest.mark.parametrize("backend", indexes.names())
def test_wrong_numbers_behind_a_right_checksum(pool: MemoryPool, backend: str) -> None:
    """Whoever can write the files can write their digests; wrong numbers must not reach native code."""
    index = AdapterIndex.build(pool, backend=backend, keys="features")
    folder = index.save()
    for path in files_of(folder / "backend"):
        good = path.read_bytes()
        for value in (0, 1, 127, 255):
            start = 128 if path.suffix == ".npy" else 0
            if path.suffix == ".json" or len(good) <= start:
                continue
            path.write_bytes(good[:start] + bytes([value]) * (len(good) - start))
            forge(folder)
            with contextlib.suppress(StorageError, DataError):
                AdapterIndex.open(folder, pool).query(QUERIES, 7)
        path.write_bytes(good)
    forge(folder)
    assert AdapterIndex.open(folder, pool).query(QUERIES, 3) == index.query(QUERIES, 3)


def test_numbers_that_are_not_finite_behind_a_right_checksum(pool: MemoryPool) -> None:
    folder = AdapterIndex.build(pool, backend="exact", keys="features").save()
    vectors = np.load(folder / "backend" / "vectors.npy")
    vectors[1, 2] = np.nan
    np.save(folder / "backend" / "vectors.npy", vectors)
    forge(folder)
    with pytest.raises(StorageError, match=r"vectors\.npy holds numbers that are not finite"):
        AdapterIndex.open(folder, pool)


def test_a_header_that_ends_in_the_middle(pool: MemoryPool) -> None:
    folder = AdapterIndex.build(pool, backend="exact").save()
    content = (folder / "label.npy").read_bytes()
    (folder / "label.npy").write_bytes(content[:27] + bytes(101) + content[128:])
    forge(folder)
    with pytest.raises(StorageError, match=r"label\.npy is missing, damaged or no \.npy array"):
        AdapterIndex.open(folder, pool)


def test_scores_that_overflow(pool: MemoryPool) -> None:
    folder = AdapterIndex.build(pool, backend="exact", metric="l2").save()
    mean = np.load(folder / "mean.npy")
    np.save(folder / "mean.npy", np.full_like(mean, 1e30))
    forge(folder)
    with pytest.raises(DataError, match="scores are not finite"):
        AdapterIndex.open(folder, pool).query(QUERIES, 3)


def test_codes_without_what_was_trained(pool: MemoryPool) -> None:
    folder = AdapterIndex.build(pool, backend="sq8", keys="features").save()
    np.save(folder / "backend" / "trained.npy", np.empty(0, np.float32))
    forge(folder)
    with pytest.raises(StorageError, match=r"trained\.npy has no numbers"):
        AdapterIndex.open(folder, pool)


def forge(folder: Path) -> None:
    plain = json.loads((folder / "index.json").read_text())
    for name in plain["files"]:
        content = (folder / name).read_bytes()
        plain["files"][name] = [len(content), hashlib.sha256(content).hexdigest()]
    (folder / "index.json").write_text(json.dumps(plain))


@pytest.mark.parametrize(
    "change",
    [
        {"schema_version": 99},
        {"records": ["task-000"]},
        {"records": [1, 2, 3, 4, 5]},
        {"digests": {}},
        {"config": {"metric": "l2"}},
        {"config": {"backend": "nothing"}},
        {"config": 3},
        {"files": {}},
        {"files": {"../../x": [1, "0"]}},
        {"files": None},
        {"threshold": "high"},
        {"shrinkage": None},
    ],
)
def test_contradicting_json(pool: MemoryPool, change: dict[str, Any]) -> None:
    folder = AdapterIndex.build(pool).save()
    plain = json.loads((folder / "index.json").read_text())
    (folder / "index.json").write_text(json.dumps(plain | change))
    with pytest.raises(StorageError, match="index"):
        AdapterIndex.open(folder, pool)


def test_large_files_are_checked_on_demand(pool: MemoryPool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cl_adapters.index.files.ALWAYS", 1000)
    folder = AdapterIndex.build(pool, backend="exact", keys="features").save()
    path = folder / "backend" / "vectors.npy"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))
    AdapterIndex.open(folder, pool)
    with pytest.raises(StorageError, match="altered"):
        AdapterIndex.open(folder, pool, verify=True)


@pytest.mark.parametrize("backend", indexes.names())
def test_no_special_file_is_waited_for(pool: MemoryPool, backend: str) -> None:
    """A pipe has no end to wait for, and a device no end at all."""
    folder = AdapterIndex.build(pool, backend=backend).save()
    plain = json.loads((folder / "index.json").read_text())

    def stop(*_: object) -> None:
        raise AssertionError("it waited")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(10)
    try:
        for path in [*files_of(folder), folder / "index.json"]:
            for make in (os.mkfifo, lambda place: place.symlink_to("/dev/zero")):
                path.rename(pool.path / "kept")
                make(path)
                if path.name != "index.json":  # as who forges a pipe would record it
                    plain["files"][str(path.relative_to(folder))][0] = 0
                    (folder / "index.json").write_text(json.dumps(plain))
                for mmap in (True, False):
                    with pytest.raises(StorageError, match="index"):
                        AdapterIndex.open(None, pool, mmap=mmap)
                path.unlink()
                (pool.path / "kept").rename(path)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def test_saving_leaves_other_things_alone(pool: MemoryPool, tmp_path: Path) -> None:
    index = AdapterIndex.build(pool)
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.png").write_bytes(b"x")
    with pytest.raises(StorageError, match="no index"):
        index.save(tmp_path / "photos")
    index.save()
    with pytest.raises(StorageError, match="exists"):
        index.save(overwrite=False)
    held = AdapterIndex.open(None, pool)
    wanted = held.query(QUERIES, 3)
    index.remove(["task-000"])
    index.save()
    assert held.query(QUERIES, 3) == wanted  # whoever has the old one open keeps it
    assert os.listdir(pool.path / "index") == ["default"]


SAVES = """
import sys
from pathlib import Path
from cl_adapters.index.files import open_index, save_index

folder, *states = map(Path, sys.argv[1:])
opened = [open_index(state, mmap=True, verify=False)[0] for state in states]
print(flush=True)
while True:
    for contents in opened:
        save_index(contents, folder, True, None, False)
"""


def test_opened_while_another_process_saves_it(pool: MemoryPool, tmp_path: Path) -> None:
    """Every time as one of the two states that the other process saves in turn."""
    states = [tmp_path / "one", tmp_path / "other"]
    for state, per_class in zip(states, (2, 9), strict=True):
        AdapterIndex.build(pool, keys="features", per_class=per_class, backend="exact").save(state)
    wanted = [AdapterIndex.open(state, pool).query(QUERIES, 3) for state in states]
    folder = AdapterIndex.build(pool, keys="features", per_class=2, backend="exact").save()
    writer = subprocess.Popen([sys.executable, "-c", SAVES, folder, *states], stdout=subprocess.PIPE)
    try:
        assert writer.stdout is not None
        assert writer.stdout.readline() == b"\n"
        found = [AdapterIndex.open(folder, pool) for _ in range(60)]
    finally:
        writer.kill()
        writer.communicate()
    assert {len(index) for index in found} == {20, 90}
    for index in found[::10]:
        assert index.query(QUERIES, 3) == wanted[len(index) == 90]


def test_an_index_that_never_stands_still(pool: MemoryPool, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = AdapterIndex.build(pool).save()
    monkeypatch.setattr("cl_adapters._io.TRIES", 3)
    real, read = files._read_index, []

    def replaced(*args: Any, **options: Any) -> Any:
        read.append(real(*args, **options))
        AdapterIndex.build(pool).save()
        return read[-1]

    monkeypatch.setattr(files, "_read_index", replaced)
    with pytest.raises(StorageError, match="saved again and again while it is read"):
        AdapterIndex.open(folder, pool)
    assert len(read) == 3


def test_saving_refuses_what_the_pool_has_no_more(pool: MemoryPool) -> None:
    index = AdapterIndex.build(pool)
    pool.retag("task-003")
    index.save()
    pool.drop("task-004")
    pool.put("task-001", knowledge_of([2, 3], n=5), [2, 3])
    with pytest.raises(StorageError, match="the pool has lost task-001, task-004"):
        index.save()
    index.refresh()
    index.save()
    assert set(AdapterIndex.open(None, pool).records) == {record.id for record in pool.records}
