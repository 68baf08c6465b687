"""What every registered index back-end keeps, with ``exact`` as the oracle and NumPy in float64 as the oracle's."""

from __future__ import annotations

import dataclasses
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cl_adapters.errors import ConfigError, DataError, UnknownName
from cl_adapters.index import IndexBackend, indexes
from cl_adapters.index.backends.base import Floats, Ids, Metric

WIDTH = 16
METRICS: tuple[Metric, ...] = ("ip", "l2")


@pytest.fixture(params=indexes.names())
def kind(request: pytest.FixtureRequest) -> type[IndexBackend]:
    return indexes.get(request.param)


@pytest.fixture(params=METRICS)
def metric(request: pytest.FixtureRequest) -> Metric:
    chosen: Metric = request.param
    return chosen


def clustered(n: int, seed: int = 0, clusters: int = 40) -> Floats:
    """Unit vectors around centres that do not depend on the seed."""
    centres = np.random.default_rng(99).standard_normal((clusters, WIDTH))
    draw = np.random.default_rng(seed)
    x = centres[draw.integers(0, clusters, n)] + 0.3 * draw.standard_normal((n, WIDTH))
    unit: Floats = (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)
    return unit


def ids_for(n: int, start: int = 3) -> Ids:
    """Neither dense nor sorted, as after removals."""
    shuffled: Ids = np.random.default_rng(5).permutation(n).astype(np.int64) * 2 + start
    return shuffled


def truth(vectors: Floats, queries: Floats, metric: Metric) -> Any:
    v, q = vectors.astype(np.float64), queries.astype(np.float64)
    return q @ v.T if metric == "ip" else -((q[:, None] - v) ** 2).sum(-1)


def check_scores(kind: type[IndexBackend], vectors: Floats, ids: Ids, q: Floats, metric: Metric, found: Any) -> float:
    """Scores belong to the ids and fall; returns recall@k by score, so that (nearly) equal ones are equally good."""
    rounding = 0.03 if kind.rounded else 2e-5
    scores, got = found
    every = truth(vectors, q, metric)
    place = {int(i): row for row, i in enumerate(ids)}
    rows = np.array([[place[int(i)] for i in line] for line in got])
    of_ids = np.take_along_axis(every, rows, 1)
    assert np.allclose(scores, of_ids, atol=rounding)
    assert (np.diff(scores, axis=1) <= 1e-5).all()
    assert all(len(set(line)) == len(line) for line in got.tolist())
    kth = np.sort(every, axis=1)[:, -got.shape[1]][:, None]
    return float((of_ids >= kth - rounding).mean())


@pytest.mark.parametrize("batch", [1, 32])
def test_neighbours_and_scores(kind: type[IndexBackend], metric: Metric, batch: int) -> None:
    vectors, ids, queries = clustered(3000), ids_for(3000), clustered(64, seed=1)
    index = kind.build(vectors, ids, metric=metric)
    parts = [index.search(queries[i : i + batch], 10) for i in range(0, 64, batch)]
    scores, found = np.concatenate([p[0] for p in parts]), np.concatenate([p[1] for p in parts])
    assert scores.dtype == np.float32 and found.dtype == np.int64 and found.shape == (64, 10)
    recall = check_scores(kind, vectors, ids, queries, metric, (scores, found))
    assert recall == 1 if kind.exact else recall >= 0.9
    best = check_scores(kind, vectors, ids, queries, metric, (scores[:, :1], found[:, :1]))
    assert best >= (1 if kind.exact else 0.95)


def test_same_order_as_exact(metric: Metric) -> None:
    vectors, ids, queries = clustered(2000), ids_for(2000), clustered(32, seed=1)
    oracle = indexes.get("exact").build(vectors, ids, metric=metric).search(queries, 20)
    for name in indexes.names():
        if indexes.get(name).exact:
            scores, found = indexes.get(name).build(vectors, ids, metric=metric).search(queries, 20)
            assert np.allclose(scores, oracle[0], atol=2e-5)
            differ = found != oracle[1]  # only where neighbouring scores are equal up to rounding
            gaps = np.abs(np.diff(oracle[0], axis=1))
            tied = np.pad(gaps, ((0, 0), (1, 0)), constant_values=1) < 2e-5
            tied |= np.pad(gaps, ((0, 0), (0, 1)), constant_values=1) < 2e-5
            assert not (differ & ~tied).any()


def test_empty_then_grown(kind: type[IndexBackend], metric: Metric) -> None:
    index = kind.build(np.empty((0, WIDTH), np.float32), np.empty(0, np.int64), metric=metric)
    assert len(index) == 0
    scores, found = index.search(clustered(2), 3)
    assert (found == -1).all() and np.isneginf(scores).all()
    one = clustered(1, seed=3)
    index.add(np.array([7]), one)
    scores, found = index.search(one, 3)
    assert found.tolist() == [[7, -1, -1]]
    assert scores[0, 0] == pytest.approx(1 if metric == "ip" else 0, abs=1e-2)
    vectors, ids = clustered(1500), ids_for(1500, start=1000)
    for part in range(0, 1500, 500):
        index.add(ids[part : part + 500], vectors[part : part + 500])
    both, all_ids = np.concatenate([one, vectors]), np.concatenate([[7], ids])
    queries = clustered(40, seed=2)
    assert check_scores(kind, both, all_ids, queries, metric, index.search(queries, 1)) >= (1 if kind.exact else 0.95)
    assert index.nbytes >= 1501 * WIDTH


def test_removed_vectors_are_not_found(kind: type[IndexBackend], metric: Metric) -> None:
    vectors, ids, queries = clustered(1200), ids_for(1200), clustered(30, seed=1)
    for share in (0.1, 0.6):  # a graph keeps some as way-marks and is built anew for more
        index = kind.build(vectors, ids, metric=metric)
        gone = ids < np.quantile(ids, share)
        index.remove(ids[gone])
        assert len(index) == (~gone).sum() and set(index.ids_M) == set(ids[~gone])
        recall = check_scores(kind, vectors[~gone], ids[~gone], queries, metric, index.search(queries, 5))
        assert recall >= (1 if kind.exact else 0.9)
        index.add(ids[gone], vectors[gone])
        assert index.search(vectors[gone][:5], 1)[1][:, 0].tolist() == ids[gone][:5].tolist() or not kind.exact
        index.remove(ids)
        assert len(index) == 0 and (index.search(queries, 2)[1] == -1).all()
        index.add(ids[:5], vectors[:5])
        assert set(index.search(vectors[:5], 5)[1].ravel()) == set(ids[:5])


@pytest.mark.parametrize("share", [0.003, 0.05, 0.5, 1.0])
def test_filter(kind: type[IndexBackend], metric: Metric, share: float) -> None:
    vectors, ids, queries = clustered(1500), ids_for(1500), clustered(20, seed=1)
    index = kind.build(vectors, ids, metric=metric)
    allowed = np.random.default_rng(0).permutation(ids)[: int(1500 * share)]
    scores, found = index.search(queries, 10, np.concatenate([allowed, allowed, [-5, 10**7]]))
    wanted = min(10, len(allowed))
    assert (found[:, :wanted] >= 0).all() and (found[:, wanted:] == -1).all()
    keep = np.isin(ids, allowed)
    recall = check_scores(kind, vectors[keep], ids[keep], queries, metric, (scores[:, :wanted], found[:, :wanted]))
    assert recall >= (1 if kind.exact else 0.9)
    assert (index.search(queries, 3, np.empty(0, np.int64))[1] == -1).all()


def test_more_asked_than_there_is(kind: type[IndexBackend], metric: Metric) -> None:
    vectors, ids = clustered(300), ids_for(300)
    scores, found = kind.build(vectors, ids, metric=metric).search(clustered(3, seed=1), 400)
    assert (np.sort(found[:, :300]) == np.sort(ids)).all()
    assert (found[:, 300:] == -1).all() and np.isneginf(scores[:, 300:]).all()


def test_duplicates_are_all_found(kind: type[IndexBackend], metric: Metric) -> None:
    vectors = np.concatenate([clustered(200), np.repeat(clustered(1, seed=8), 6, axis=0)])
    found = kind.build(vectors, np.arange(206), metric=metric).search(vectors[-1:], 6)[1]
    assert set(found[0]) == set(range(200, 206))
    same = kind.build(np.repeat(vectors[:1], 300, axis=0), np.arange(300), metric=metric)
    assert len(set(same.search(vectors[:1], 300)[1][0])) == 300


@pytest.mark.parametrize("mmap", [True, False])
def test_saved_and_opened(kind: type[IndexBackend], metric: Metric, mmap: bool, tmp_path: Path) -> None:
    vectors, ids, queries = clustered(1000), ids_for(1000), clustered(25, seed=1)
    index = kind.build(vectors, ids, metric=metric, seed=3)
    index.remove(ids[:10])
    index.save(tmp_path)
    opened = IndexBackend.load(tmp_path, mmap=mmap)
    assert type(opened) is kind and opened.options == index.options and opened.seed == 3
    assert opened.nbytes == index.nbytes
    for allowed in (None, ids[100:400]):
        mine, other = index.search(queries, 7, allowed), opened.search(queries, 7, allowed)
        assert np.array_equal(mine[0], other[0]) and np.array_equal(mine[1], other[1])
    more, more_ids = clustered(50, seed=4), np.arange(50) + 10**5
    for each in (index, opened):  # what is changed later is changed alike, and the files stay as they are
        each.add(more_ids, more)
        each.remove(ids[20:40])
    assert np.array_equal(index.search(queries, 7)[1], opened.search(queries, 7)[1])
    assert len(IndexBackend.load(tmp_path)) == 990


def test_empty_saved(kind: type[IndexBackend], tmp_path: Path) -> None:
    kind.build(np.empty((0, WIDTH), np.float32), np.empty(0, np.int64), metric="l2").save(tmp_path)
    opened = IndexBackend.load(tmp_path)
    opened.add(np.array([1, 2]), clustered(2))
    assert set(opened.search(clustered(2), 2)[1].ravel()) == {1, 2}


def test_the_same_arguments_give_the_same_index(kind: type[IndexBackend], tmp_path: Path) -> None:
    before: Any = np.random.get_state()
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        kind.build(clustered(1500), ids_for(1500), metric="ip", seed=1).save(tmp_path / name)
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes(), path.name
    after: Any = np.random.get_state()
    assert np.array_equal(before[1], after[1])


def test_many_threads_read(kind: type[IndexBackend], metric: Metric) -> None:
    queries = clustered(240, seed=1)
    index = kind.build(clustered(1000), ids_for(1000), metric=metric)
    parts = [queries[i : i + 30] for i in range(0, 240, 30)] * 4
    alone = [index.search(part, 5) for part in parts]
    with ThreadPoolExecutor(8) as workers:
        together = list(workers.map(lambda part: index.search(part, 5), parts))
    for one, other in zip(alone, together, strict=True):
        assert np.array_equal(one[1], other[1])


def test_inputs_stay_as_they_are_and_are_not_kept(kind: type[IndexBackend]) -> None:
    vectors, ids = clustered(300), ids_for(300)
    index = kind.build(vectors, ids, metric="ip")
    before = index.search(clustered(5, seed=1), 3)
    vectors[:], ids[:] = 0, 0
    assert np.array_equal(index.search(clustered(5, seed=1), 3)[1], before[1])
    locked = clustered(300)
    locked.flags.writeable = False
    kind.build(locked, ids_for(300), metric="l2").search(locked[:3], 2)


def test_bad_input(kind: type[IndexBackend]) -> None:
    index = kind.build(clustered(50), np.arange(50), metric="ip")
    with pytest.raises(DataError, match=r"\[N, 16\]"):
        index.search(np.zeros((2, 15), np.float32), 1)
    for bad in (np.nan, np.inf, 1e300):
        queries = clustered(3).astype(np.float64)
        queries[1, 2] = bad
        with pytest.raises(DataError, match="row 1 is not finite"):
            index.search(queries, 1)  # type: ignore[arg-type]
        with pytest.raises(DataError, match="row 1 is not finite"):
            index.add(np.array([70, 71, 72]), queries)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="real numbers"):
        index.search(np.zeros((1, 16), complex), 1)
    with pytest.raises(ConfigError, match="at least 1"):
        index.search(clustered(1), 0)
    for ids in ([1, 99], [98, 98], [-1, 98]):
        with pytest.raises(DataError, match="distinct"):
            index.add(np.array(ids), clustered(2))
    with pytest.raises(DataError, match="as many ids"):
        index.add(np.array([99]), clustered(2))
    with pytest.raises(DataError, match="id 50"):
        index.remove(np.array([3, 50]))
    assert len(index) == 50
    unknown: Any = "cosine"
    with pytest.raises(ConfigError, match="metrics ip, l2"):
        kind.build(clustered(2), np.arange(2), metric=unknown)
    with pytest.raises(ConfigError, match="options"):
        kind.build(clustered(2), np.arange(2), metric="ip", options={"lists": 3})


def test_options_are_frozen_and_described(kind: type[IndexBackend]) -> None:
    assert dataclasses.is_dataclass(kind.Options) and kind.Options.__doc__ and kind.summary
    with pytest.raises(UnknownName, match="did you mean 'hnsw'"):
        indexes.get("hnws")
