"""The nearest classes instead of the nearest keys, and what may be asked: features, inputs, tokens, texts."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from cl_adapters import AdapterIndex
from cl_adapters.errors import DataError
from cl_adapters.index import classes
from tests.index.conftest import LABELS, QUERIES, MemoryPool, features


@pytest.mark.parametrize("backend", ["exact", "flat", "ivf"])
def test_each_class_once_by_its_best_key(pool: MemoryPool, backend: str) -> None:
    index = AdapterIndex.build(pool, keys="features", backend=backend)
    keys = AdapterIndex.build(pool, keys="features", backend="exact").search_features(QUERIES, 200)
    for row, hits in enumerate(index.query(QUERIES, 4, classes=True)):
        best: dict[int, float] = {}
        for label, score in zip(keys.labels[row].tolist(), keys.scores[row].tolist(), strict=True):
            best.setdefault(label, score)
        assert [hit.label for hit in hits] == list(best)[:4]
        assert [hit.score for hit in hits] == pytest.approx(list(best.values())[:4], abs=1e-5)
        assert hits[0].label == LABELS[row]


def test_all_classes_where_more_are_asked_for_than_there_are(pool: MemoryPool) -> None:
    index = AdapterIndex.build(pool, keys="features")
    assert [len(hits) for hits in index.query(QUERIES[:2], 50, classes=True)] == [10, 10]
    assert [len(hits) for hits in index.query(QUERIES[:2], 50, classes=True, records=["task-001"])] == [2, 2]
    assert index.search_features(QUERIES[:2], 50, classes=True).scores.shape == (2, 50)


def test_a_class_of_two_adapters_is_found_for_each(pool: MemoryPool) -> None:
    pool.put("again", {"keys": features(0, 20, seed=3), "key_class": torch.zeros(20, dtype=torch.long)}, [0])
    hits = AdapterIndex.build(pool, keys="features").query(QUERIES[:1], 2, classes=True)[0]
    assert {(hit.record, hit.label) for hit in hits} == {("task-000", 0), ("again", 0)}


def test_no_more_keys_are_looked_at_than_said(pool: MemoryPool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(classes, "MOST", 20)  # the keys of one class
    hits = AdapterIndex.build(pool, keys="features").query(QUERIES[:1], 3, classes=True)[0]
    assert [hit.label for hit in hits] == [0]


def test_an_empty_index_finds_no_class(tmp_path: Path) -> None:
    assert AdapterIndex.build(MemoryPool(tmp_path)).query(QUERIES[:2], 3, classes=True) == [[], []]


class _Reader(torch.nn.Module):
    """A backbone of texts: the features of the class that a text names."""

    name = "reader"
    preprocessing: Any = SimpleNamespace(encode=lambda texts: torch.tensor([[int(text), 0] for text in texts]))

    def features(self, tokens_BN: Tensor) -> Tensor:
        return torch.cat([features(int(label), 1) for label in tokens_BN[:, 0]])


def test_takes_texts_and_tokens(pool: MemoryPool) -> None:
    pool.backbone = _Reader()
    index = AdapterIndex.build(pool)
    for x in (["3", "7"], torch.tensor([[3, 0], [7, 0]])):
        assert [hits[0].label for hits in index.query(x, 1)] == [3, 7]
    assert index.query("5", 1)[0][0].label == 5


def test_texts_for_a_backbone_of_images(pool: MemoryPool) -> None:
    pool.backbone.preprocessing, pool.backbone.name = None, "flat"
    with pytest.raises(DataError, match="'flat' takes no texts; give images or features"):
        AdapterIndex.build(pool).query(["a"], 1)
