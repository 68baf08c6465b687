"""Damaged and hostile pools: one clear error for who asks for the adapter, nothing run, no other adapter lost."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save
from torch import Tensor

from cl_adapters.adapters.bottleneck import Bottleneck
from cl_adapters.backbones.frozen import FrozenBackbone
from cl_adapters.errors import PoolError
from cl_adapters.pool import AdapterPool, PoolClass
from cl_adapters.pool.compression import compress_records

Make = Callable[..., dict[str, Tensor]]
Plain = dict[str, Any]
SMALL = Bottleneck(bottleneck=2)
ONE = [PoolClass(label=0)]


def edit(path: Path, change: Callable[[Plain], object]) -> None:
    """Change the JSON of a manifest."""
    plain = json.loads(path.read_text())
    change(plain)
    path.write_text(json.dumps(plain))


def edit_record(pool: AdapterPool, **values: Any) -> None:
    """Change the record of task-000 behind the pool's back."""
    edit(pool.path / "manifest.json", lambda plain: plain["records"][0].update(values))


def adapter_path(pool: AdapterPool) -> Path:
    return pool.path / pool.get("task-000").files[0]


def forge(pool: AdapterPool, content: bytes) -> None:
    """Another file as adapter of task-000, with the right SHA-256."""
    sha = hashlib.sha256(content).hexdigest()
    (pool.path / "adapters" / f"{sha}.safetensors").write_bytes(content)
    edit_record(pool, adapter_sha=sha)


def safetensors(header: object, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(shape: list[Any], start: int, end: int, dtype: object = "F32") -> Plain:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


class Bomb:
    """Its pickle makes a file when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (str(self.path),))


def changed_shape(pool: AdapterPool) -> bytes:
    tensors = load_file(adapter_path(pool))
    tensors["blocks.0.ffn/down"] = tensors["blocks.0.ffn/down"].mT.contiguous()
    return bytes(save(tensors))


def other_names(pool: AdapterPool) -> bytes:
    tensors = load_file(adapter_path(pool))
    return bytes(save({key.replace("blocks.0", "../../x"): value for key, value in tensors.items()}))


FILES: dict[str, tuple[Callable[[AdapterPool], bytes], str]] = {
    "empty": (lambda pool: b"", "it has 0 bytes"),
    "pickle": (lambda pool: pickle.dumps(Bomb(pool.path / "boom")), "not a safetensors file"),
    "torch zip": (lambda pool: b"PK\x03\x04" + bytes(100), "not a safetensors file"),
    "huge header": (lambda pool: struct.pack("<Q", 2**63) + b"{}", "declares a header of 9223372036854775808"),
    "no JSON": (lambda pool: safetensors(b"\xff{"), "header is no JSON"),
    "deep JSON": (lambda pool: safetensors(b"[" * 100_000), "header is no JSON"),
    "a list": (lambda pool: safetensors([1]), "no JSON object"),
    "key twice": (lambda pool: safetensors(b'{"a": 1, "a": 2}'), "twice"),
    "huge tensor": (lambda pool: safetensors({"a": entry([2**40], 0, 2**42)}, bytes(4)), "take 4398046511104 bytes"),
    "shape is not size": (lambda pool: safetensors({"a": entry([2**40], 0, 4)}, bytes(4)), "not that of its 4 bytes"),
    "negative": (lambda pool: safetensors({"a": entry([-1], 0, 4)}, bytes(4)), "in no known form"),
    "overlap": (
        lambda pool: safetensors({"a": entry([1], 0, 4), "b": entry([1], 0, 4)}, bytes(4)),
        "overlap, or leave holes",
    ),
    "hole": (lambda pool: safetensors({"a": entry([1], 4, 8)}, bytes(8)), "overlap, or leave holes"),
    "more behind": (lambda pool: safetensors({"a": entry([1], 0, 4)}, bytes(5)), "but 5 follow"),
    "unknown type": (lambda pool: safetensors({"a": entry([1], 0, 4, ["F32"])}, bytes(4)), "in no known form"),
    "no object": (lambda pool: safetensors({"a": 3}), "in no known form"),
    "integers": (lambda pool: safetensors({"a": entry([1], 0, 4, "I32")}, bytes(4)), "float32 is expected"),
    "too few numbers": (lambda pool: safetensors({"a": entry([1], 0, 4)}, bytes(4)), "has 1 numbers, but its record"),
    "wrong shape": (changed_shape, r"first 'blocks.0.ffn/down': expected \(2, 8\), got \(8, 2\)"),
    "wrong names": (other_names, r"first '../../x.ffn/down': expected none"),
}


def assert_other_works(pool: AdapterPool) -> None:
    adapter, knowledge = pool.get("task-001").files
    for found, file in ((pool.tensors("task-001"), adapter), (pool.knowledge("task-001"), knowledge)):
        expected = load_file(pool.path / file)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], value) for key, value in expected.items())


def assert_lost(pool: AdapterPool, match: str, id: str = "task-000", backbone: FrozenBackbone | None = None) -> None:
    """``id`` is one clear error; the other adapter works, and a change keeps everything that is there."""
    again = AdapterPool.open(pool.path, backbone=backbone)
    with pytest.raises(PoolError, match=match) as caught:
        again.tensors(id)
    assert len(str(caught.value)) < 800
    found = again.verify()
    assert not found.ok
    assert len(found.problems) == 1
    assert found.problems[0].startswith(id)
    before = json.loads((pool.path / "manifest.json").read_text())["records"]
    assert_other_works(again)
    again.tag("task-001", add=["touched"])
    after = json.loads((pool.path / "manifest.json").read_text())["records"]
    assert str(after[0]["task"]) == str(before[0]["task"])
    assert {**after[0], "task": 0} == {**before[0], "task": 0}
    assert after[1]["tags"] == ["touched"]
    again.remove(id)
    assert again.ids == ("task-001",)
    assert_other_works(again)
    assert again.verify().ok
    assert not (pool.path / "boom").exists()


@pytest.mark.parametrize("name", FILES)
def test_forged_files(pool: AdapterPool, name: str) -> None:
    make, match = FILES[name]
    forge(pool, make(pool))
    assert_lost(pool, match, backbone=pool.backbone)


def test_truncated_anywhere_and_flipped_anywhere(pool: AdapterPool) -> None:
    path = adapter_path(pool)
    whole = path.read_bytes()
    for length in range(0, len(whole), 17):
        path.write_bytes(whole[:length])
        with pytest.raises(PoolError):
            AdapterPool.open(pool.path).tensors("task-000")
    for place in range(0, len(whole), 13):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        with pytest.raises(PoolError):
            AdapterPool.open(pool.path).tensors("task-000")
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert_lost(pool, "was altered: its SHA-256 is not the recorded one")


def test_a_missing_file(pool: AdapterPool) -> None:
    adapter_path(pool).unlink()
    assert_lost(pool, "missing or unreadable: No such file")


def test_a_link_instead_of_a_file(pool: AdapterPool, tmp_path: Path) -> None:
    path = adapter_path(pool)
    shutil.move(path, tmp_path / "outside")
    path.symlink_to(tmp_path / "outside")
    assert_lost(pool, "is a link; the pool reads only files of its own")
    assert (tmp_path / "outside").is_file()  # the link was removed, not what it points at


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_no_regular_file(pool: AdapterPool, make: Callable[[Path], None]) -> None:
    path = adapter_path(pool)
    path.unlink()
    make(path)  # a pipe must not make the reader wait
    with pytest.raises(PoolError, match="not a regular file"):
        AdapterPool.open(pool.path).tensors("task-000")
    assert AdapterPool.open(pool.path).tensors("task-001")


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
@pytest.mark.parametrize("codec", [None, "fp16"])
def test_numbers_that_are_not_finite(pool: AdapterPool, number: float, codec: str | None) -> None:
    """They would make every answer of the adapter one that is not."""
    if codec is not None:
        compress_records(pool, codec, ["task-000"])
    found = load_file(adapter_path(pool))
    key = next(key for key, value in found.items() if value.is_floating_point())
    found[key].view(-1)[0] = number
    forge(pool, save(found))
    assert_lost(pool, r"\.safetensors: tensor '.*' has NaN or infinite values")


@pytest.mark.parametrize("label", [True, "1", 1.0])
def test_labels_are_whole_numbers(pool: AdapterPool, label: object) -> None:
    edit_record(pool, classes=[{"label": label, "name": None}, {"label": 7, "name": None}])
    assert_lost(pool, "label")


def test_a_folder_that_leads_out(pool: AdapterPool, tensors: Make, tmp_path: Path) -> None:
    shutil.move(pool.path / "adapters", tmp_path / "outside")
    (pool.path / "adapters").symlink_to(tmp_path / "outside")
    before = sorted(os.listdir(tmp_path / "outside"))
    for act in (
        lambda: pool.tensors("task-000"),
        lambda: pool.add(tensors(5), SMALL, ONE),
        lambda: pool.remove("task-000"),
    ):
        with pytest.raises(PoolError, match="adapters is a link that leads out of the pool"):
            act()
    pool.gc()
    assert sorted(os.listdir(tmp_path / "outside")) == before


def test_links_to_manifest_and_lock(pool: AdapterPool, tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("keep")
    (pool.path / ".lock").unlink(missing_ok=True)
    (pool.path / ".lock").symlink_to(tmp_path / "precious")
    with pytest.raises(PoolError, match=r"\.lock is a link"):
        pool.gc()
    assert (tmp_path / "precious").read_text() == "keep"
    shutil.move(pool.path / "manifest.json", tmp_path / "manifest.json")
    (pool.path / "manifest.json").symlink_to(tmp_path / "manifest.json")
    with pytest.raises(PoolError, match=r"manifest\.json is a link"):
        AdapterPool.open(pool.path)


RECORDS: dict[str, tuple[Plain, str]] = {
    "sha leads out": ({"adapter_sha": "../../x"}, "'../../x' is no SHA-256"),
    "knowledge leads out": ({"knowledge_sha": "/etc/passwd"}, "'/etc/passwd' is no SHA-256"),
    "no sha": ({"adapter_sha": None}, "both adapter and adapter_sha, or neither"),
    "no type": ({"adapter": {"bottleneck": 2}}, "adapter names its type"),
    "unknown key": ({"path": "/etc"}, "unknown option record.path"),
    "wrong kind": ({"classes": "all"}, "classes: "),
    "class twice": ({"classes": [{"label": 1, "name": None}] * 2}, "class label '1' is there twice"),
    "huge label": ({"classes": [{"label": 2**70, "name": None}]}, "64 bits"),
    "escape codes": ({"classes": [{"label": 1, "name": "\x1b[2J"}]}, "control characters"),
    "number of very many digits": ({"task": 10**4000}, "longer than 64 bits"),
    "negative": ({"num_parameters": -1}, "cannot be negative"),
    "bad parent": ({"parents": ["../../x"]}, "cannot be an adapter's id"),
}


@pytest.mark.parametrize("name", RECORDS)
def test_broken_records(pool: AdapterPool, name: str) -> None:
    values, match = RECORDS[name]
    edit_record(pool, **values)
    assert_lost(pool, match)


def test_an_id_that_leads_out(pool: AdapterPool, tmp_path: Path) -> None:
    edit_record(pool, id="../../x")
    with pytest.raises(PoolError, match="its record is broken"):
        pool.export_to(tmp_path / "one", "../../x")
    assert_lost(pool, r"'\.\./\.\./x' cannot be an adapter's id", id="../../x")


@pytest.mark.parametrize("number", ["1e999", "Infinity", "NaN"])
def test_numbers_that_json_does_not_know(pool: AdapterPool, number: str) -> None:
    path = pool.path / "manifest.json"
    path.write_text(path.read_text().replace("90.5", number))
    again = AdapterPool.open(pool.path)
    with pytest.raises(PoolError, match=r"metrics.accuracy: input should be a finite number, got"):
        again.get("task-000")
    assert_other_works(again)
    again.tag("task-001", add=["touched"])
    assert number in path.read_text()


def test_records_that_are_none(pool: AdapterPool) -> None:
    edit(
        pool.path / "manifest.json", lambda plain: plain["records"].extend([3, None, [], {"id": ["x"]}, {"id": "b\n"}])
    )
    again = AdapterPool.open(pool.path)
    assert again.ids == ("task-000", "task-001")
    assert [broken.id for broken in again.broken] == ["record 2", "record 3", "record 4", "record 5", "record 6"]
    with pytest.raises(PoolError, match=r"'record 2' is broken, so its files could be taken for orphans"):
        again.gc()
    for broken in again.broken:
        again.remove(broken.id)
    assert again.gc() == ()


def test_the_same_id_twice(pool: AdapterPool) -> None:
    edit_record(pool, id="task-001")
    again = AdapterPool.open(pool.path)
    assert again.ids == ()
    assert len(again.broken) == 2
    with pytest.raises(PoolError, match="'task-001' stands in the manifest twice"):
        again.tensors("task-001")


@pytest.mark.parametrize(
    ("adapter", "match"),
    [
        ({"type": "no-such-type"}, "unknown adapter type 'no-such-type'"),
        ({"type": "bottleneck", "bottleneck": 2, "code": "x"}, "unknown option adapter.code"),
        ({"type": "bottleneck", "bottleneck": "x"}, "adapter.bottleneck"),
        ({"type": "bottleneck", "bottleneck": -1}, "at least 1"),
    ],
)
def test_adapter_types_that_are_not_known(pool: AdapterPool, adapter: Plain, match: str) -> None:
    edit_record(pool, adapter=adapter)
    assert_lost(pool, match)


@pytest.mark.parametrize("bottleneck", [3, 2**16])
def test_options_that_are_not_the_tensors(pool: AdapterPool, bottleneck: int) -> None:
    edit_record(pool, adapter={"type": "bottleneck", "bottleneck": bottleneck})
    AdapterPool.open(pool.path).tensors("task-000")  # without the backbone nobody can tell
    assert_lost(pool, rf"expected \({bottleneck}, 8\), got \(2, 8\)", backbone=pool.backbone)
