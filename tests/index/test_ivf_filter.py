"""Inverted lists with a filter: the fewer vectors are allowed, the more lists are looked at, all of them if need be."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from cl_adapters.index import indexes

WIDTH, LISTS, EACH = 4, 8, 10


def lists() -> tuple[Any, np.ndarray[Any, Any]]:
    """An index that looks at one list. Its lists are 8 clusters on a line; cluster c has the ids 10 c to 10 c + 9."""
    draw = np.random.default_rng(0)
    centres = np.zeros((LISTS, WIDTH), np.float32)
    centres[:, 0] = 10 * np.arange(LISTS)
    vectors = np.repeat(centres, EACH, axis=0) + draw.normal(0, 0.1, (LISTS * EACH, WIDTH)).astype(np.float32)
    cls: Any = indexes.get("ivf")
    options = cls.Options(lists=LISTS, probes=1)
    index = cls.build(vectors[:0], np.empty(0, np.int64), metric="l2", options=options)
    index._index = index._empty(LISTS)
    index._coarse.add(centres)  # as k-means may find them, or not
    index._index.is_trained, index._trained_on = True, LISTS * EACH
    index.add(np.arange(LISTS * EACH), vectors)
    sizes = [index._index.invlists.list_size(i) for i in range(LISTS)]
    assert sizes == [EACH] * LISTS, "each cluster is a list; else this test sees nothing"
    return index, vectors


def probed(index: Any, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Queries and lists of each look, in order."""
    seen: list[tuple[int, int]] = []
    real = index._probe

    def probe(queries: Any, k: int, probes: int, selector: Any) -> Any:
        seen.append((len(queries), probes))
        return real(queries, k, probes, selector)

    monkeypatch.setattr(index, "_probe", probe)
    return seen


def test_the_nearest_allowed_may_be_in_another_list(monkeypatch: pytest.MonkeyPatch) -> None:
    """A vector that is allowed in the nearest list is no reason to stay there."""
    index, vectors = lists()
    query = vectors[:1].copy()
    query[0, 0] = 4.5  # nearer to cluster 0, which has one allowed vector behind it; those of cluster 1 are farther
    index.add(np.array([100]), np.array([[-3.0, 0, 0, 0]], np.float32))
    allowed = np.array([100, *range(10, 20)])
    seen = probed(index, monkeypatch)
    assert index.search(query, 1)[1].tolist()[0][0] < 10, "one list is looked at where everything is allowed"
    scores, found = index.search(query, 1, allowed)
    assert 10 <= found[0, 0] < 20
    assert scores[0, 0] == pytest.approx(-30.25, abs=2)
    assert seen == [(1, 1), (1, 8)], "11 of 81 are allowed: 81 / 11, rounded up, is 8"
    seen.clear()
    index.search(query, 1, np.arange(41))
    assert seen == [(1, 2)], "41 of 81: two lists, and no second look"


def test_all_lists_where_the_near_ones_have_too_few(monkeypatch: pytest.MonkeyPatch) -> None:
    index, vectors = lists()
    queries = vectors[[0, 45]]
    queries[1, 0] = 44  # between clusters 4 and 5
    allowed = np.arange(40, 80)  # the far half
    seen = probed(index, monkeypatch)
    for k in (1, 5, 12, 21, 40):
        seen.clear()
        scores, found = index.search(queries, k, allowed)
        order = np.argsort(np.square(vectors[40:][None] - queries[:, None]).sum(2), axis=1)[:, :k] + 40
        assert np.array_equal(found, order), k
        assert np.isfinite(scores).all()
        assert seen[0] == (2, 2)
        short = [row for row, near in enumerate((0, 20)) if near < k]  # allowed vectors in each one's nearest two lists
        assert seen[1:] == ([(len(short), LISTS)] if short else [])


def test_more_wanted_than_the_lists_hold_without_a_filter(monkeypatch: pytest.MonkeyPatch) -> None:
    index, vectors = lists()
    seen = probed(index, monkeypatch)
    found = index.search(vectors[:2], EACH + 1)[1]
    assert (found >= 0).all()
    assert {10 <= row[-1] < 20 for row in found} == {True}, "the next one is in the next cluster"
    assert seen == [(2, 1), (2, LISTS)]
