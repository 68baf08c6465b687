"""Manifests that are none, and what a pool does not take in."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save
from torch import Tensor

from cl_adapters.adapters.bottleneck import Bottleneck
from cl_adapters.errors import ClAdaptersError, IncompatibleBackbone, PoolError
from cl_adapters.pool import AdapterPool, PoolClass

Make = Callable[..., dict[str, Tensor]]
Plain = dict[str, Any]
SMALL = Bottleneck(bottleneck=2)
ONE = [PoolClass(label=0)]


def edit(path: Path, change: Callable[[Plain], object]) -> None:
    """Change the JSON of a manifest."""
    plain = json.loads(path.read_text())
    change(plain)
    path.write_text(json.dumps(plain))


class Bomb:
    """Its pickle makes a file when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (str(self.path),))


MANIFESTS: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "cannot be read as JSON"),
    "truncated": (b'{"schema_version": 1, "backb', "cannot be read as JSON"),
    "no text": (b"\xff\xfe", "cannot be read as JSON"),
    "deep": (b"[" * 100_000, "cannot be read as JSON"),
    "NaN": (b'{"schema_version": NaN}', "has no schema_version"),
    "pickle": (pickle.dumps({"schema_version": 1}), "cannot be read as JSON"),
    "list": (b"[]", "has no schema_version"),
    "true": (b'{"schema_version": true}', "has no schema_version"),
    "negative": (b'{"schema_version": -1}', "has no schema_version"),
    "newer": (b'{"schema_version": 99}', "has schema 99, this cl-adapters reads up to 1; upgrade cl-adapters"),
    "no backbone": (b'{"schema_version": 1, "records": []}', "no backbone or no list of records"),
    "no records": (b'{"schema_version": 0, "backbone": {}, "records": {}}', "no backbone or no list of records"),
    "half a backbone": (b'{"schema_version": 1, "backbone": {"name": "x"}, "records": []}', "is required"),
}


@pytest.mark.parametrize("name", MANIFESTS)
def test_manifests_that_are_none(pool: AdapterPool, name: str, tensors: Make) -> None:
    content, match = MANIFESTS[name]
    path = pool.path / "manifest.json"
    path.write_bytes(content)
    with pytest.raises(PoolError, match=match) as caught:
        AdapterPool.open(pool.path)
    assert "\n" not in str(caught.value)
    assert pool.verify().problems == (str(caught.value),)
    for act in (lambda: pool.add(tensors(5), SMALL, ONE), pool.gc, lambda: pool.remove("task-000")):
        with pytest.raises(PoolError):
            act()
    assert path.read_bytes() == content
    assert len(list(pool.path.glob("adapters/*"))) == 2


def test_the_source_of_the_backbone(pool: AdapterPool) -> None:
    path = pool.path / "manifest.json"
    edit(path, lambda plain: plain["backbone"].update(source={"name": "x", "trust_remote_code": True}))
    with pytest.raises(PoolError, match="source of the backbone"):
        _ = AdapterPool.open(pool.path).backbone
    edit(path, lambda plain: plain["backbone"].update(source={"name": "vit_glyph_tiny"}))
    with pytest.raises(IncompatibleBackbone, match="fingerprint"):
        _ = AdapterPool.open(pool.path).backbone


def test_adding_refuses_what_is_not_the_types(pool: AdapterPool, tensors: Make) -> None:
    good = tensors(5)
    key = "blocks.1.ffn/up"
    wrong: list[tuple[dict[str, Any], str]] = [
        ({**good, key: good[key].mT}, r"first 'blocks.1.ffn/up': expected \(8, 2\), got \(2, 8\)"),
        ({k: v for k, v in good.items() if k != key}, "got none"),
        ({**good, "blocks.7.ffn/up": good[key]}, "first 'blocks.7.ffn/up': expected none"),
        ({}, "has not the tensors"),
        ({**good, key: good[key].double()}, "is F64; float32 is expected"),
        ({**good, key: good[key].int()}, "is I32; float32 is expected"),
        ({**good, key: good[key] / 0}, "NaN or infinite"),
        ({**good, key: [1.0]}, "is list; names and tensors are expected"),
    ]
    before = (pool.path / "manifest.json").read_bytes()
    for bad, match in wrong:
        with pytest.raises(PoolError, match=match):
            pool.add(bad, SMALL, ONE)
    with pytest.raises(PoolError, match="tensors without an adapter type"):
        pool.add(good, None, ONE)
    with pytest.raises(PoolError, match="cannot be an adapter's id"):
        pool.add(good, SMALL, ONE, id="../../x")
    with pytest.raises(ClAdaptersError, match="unknown codec 'zip'"):
        pool.add(good, SMALL, ONE, compression="zip")
    assert (pool.path / "manifest.json").read_bytes() == before
    assert pool.verify().orphans == ()


WRONG_KNOWLEDGE: list[tuple[Callable[[dict[str, Tensor]], object], str]] = [
    (lambda k: k.update(prototypes=torch.zeros(3, 8)), r"prototypes has to be F32 \[C, D\] = \[2, 8\]"),
    (lambda k: k.update(prototypes=torch.zeros(2, 9)), r"got F32 \[2, 9\]"),
    (lambda k: k.update(prototypes=torch.zeros(2, 8).double()), "got F64"),
    (lambda k: k.update(keys=torch.zeros(5, 8)), r"\[M(, D)?\]"),
    (lambda k: k.update(key_class=torch.full((6,), 2)), "key_class has values 2..2, but positions in its 2 classes"),
    (lambda k: k.update(held_out_class=torch.full((3,), -1)), "held_out_class has values -1..-1"),
    (lambda k: k.pop("held_out_class"), "held_out and held_out_class go together"),
    (lambda k: k.update(secrets=torch.zeros(1)), "unknown tensor 'secrets'; known: keys, key_class"),
]


@pytest.mark.parametrize(("change", "match"), WRONG_KNOWLEDGE)
def test_knowledge_of_other_classes_is_refused_at_both_ends(
    pool: AdapterPool, tensors: Make, knowledge: Make, change: Callable[[dict[str, Tensor]], object], match: str
) -> None:
    bad = knowledge(0)
    change(bad)
    with pytest.raises(PoolError, match=match):
        pool.add(tensors(5), SMALL, [PoolClass(label=0), PoolClass(label=1)], knowledge=bad)
    content = bytes(save(bad))
    sha = hashlib.sha256(content).hexdigest()
    (pool.path / "knowledge" / f"{sha}.safetensors").write_bytes(content)
    edit(pool.path / "manifest.json", lambda plain: plain["records"][0].update(knowledge_sha=sha))
    with pytest.raises(PoolError, match=match):
        AdapterPool.open(pool.path).knowledge("task-000")
    assert len(AdapterPool.open(pool.path).verify().problems) == 1


def test_hostile_folders_are_not_imported(pool: AdapterPool, tmp_path: Path) -> None:
    before = sorted(pool.path.rglob("*"))
    folder = pool.export_to(tmp_path / "good", "task-000")

    def refused(match: str, change: Callable[[Path], object]) -> None:
        shutil.rmtree(tmp_path / "bad", ignore_errors=True)
        shutil.copytree(folder, tmp_path / "bad")
        change(tmp_path / "bad")
        with pytest.raises(PoolError, match=match):
            pool.import_from(tmp_path / "bad", id="new")

    def set_id(plain: Plain) -> None:
        plain["records"][0]["id"] = "../../x"

    bomb = pickle.dumps(Bomb(tmp_path / "boom"))
    refused("missing", lambda bad: (bad / "record.json").unlink())
    refused("missing", lambda bad: (bad / "adapter.safetensors").unlink())
    refused("not a safetensors file", lambda bad: (bad / "adapter.safetensors").write_bytes(bomb))
    refused("cannot be read as JSON", lambda bad: (bad / "record.json").write_bytes(bomb))
    refused("cannot be an adapter's id", lambda bad: edit(bad / "record.json", set_id))
    refused("has 2 records", lambda bad: edit(bad / "record.json", lambda plain: plain["records"].append(1)))
    refused("SHA-256", lambda bad: shutil.copy(pool.path / pool.get("task-001").files[0], bad / "adapter.safetensors"))
    with pytest.raises(PoolError, match="cannot be an adapter's id"):
        pool.import_from(folder, id="../../x")
    assert sorted(pool.path.rglob("*")) == before
    assert not (tmp_path / "boom").exists()
