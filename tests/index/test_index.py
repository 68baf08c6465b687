"""The index of a pool: keys, metrics, filters, changes, files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from cl_adapters import AdapterIndex
from cl_adapters.errors import ConfigError, DataError, UnknownName
from cl_adapters.index import indexes
from cl_adapters.index.contents import choose
from tests.index.conftest import LABELS, QUERIES, WIDTH, MemoryPool, features, knowledge_of, labels_found

METRICS = ("cosine", "ip", "l2", "mahalanobis")


@pytest.mark.parametrize("metric", ["cosine", "l2", "mahalanobis"])
@pytest.mark.parametrize("keys", ["prototypes", "centroids", "features"])
def test_finds_class_adapter_and_name(pool: MemoryPool, metric: Any, keys: Any) -> None:
    index = AdapterIndex.build(pool, metric=metric, keys=keys)
    assert len(index) == 10 * {"prototypes": 1, "centroids": 4, "features": 20}[keys]
    for label, (first, *_) in zip(LABELS.tolist(), index.query(QUERIES, 3), strict=True):
        assert (first.label, first.record, first.name) == (label, f"task-{label // 2:03d}", f"class {label}")


@pytest.mark.parametrize("metric", METRICS)
def test_scores_are_those_of_the_definition(pool: MemoryPool, metric: Any) -> None:
    found = AdapterIndex.build(pool, metric=metric).search_features(QUERIES, 10)
    f = QUERIES.double()
    mu = torch.stack([features(label, 20).double().mean(0) for label in range(10)])
    d = f[:, None] - mu
    if metric == "mahalanobis":
        x = torch.cat([features(label, 20).double() - mu[label] for label in range(10)])
        s = x.T @ x / len(x)
        level = s.trace() / WIDTH  # Ledoit and Wolf, written out
        noise = sum((torch.outer(row, row) - s).square().sum() for row in x) / len(x) ** 2
        share = min(1.0, float(noise / (s - level * torch.eye(WIDTH)).square().sum()))
        sigma = ((1 - share) * s + share * level * torch.eye(WIDTH)) * len(x) / (len(x) - 10)
        wanted = -torch.einsum("bcd,de,bce->bc", d, sigma.inverse(), d)
    else:
        cosine = torch.nn.functional.cosine_similarity(f[:, None], mu, dim=-1)
        wanted = {"cosine": cosine, "ip": f @ mu.T, "l2": -d.square().sum(-1)}[metric]
    by_label = torch.empty_like(found.scores).scatter_(1, found.labels, found.scores)
    assert torch.allclose(by_label.double(), wanted, rtol=2e-5, atol=2e-5)
    assert found.scores.dtype == torch.float32 and (found.scores.diff(dim=1) <= 0).all()


def test_mahalanobis_sees_what_euclid_misses(tmp_path: Path) -> None:
    spread = torch.tensor([10.0] + [0.1] * (WIDTH - 1))  # classes vary along the first axis only
    means = torch.zeros(2, WIDTH)
    means[1, 1] = 1
    draw = torch.randn(200, 2, WIDTH, generator=torch.Generator().manual_seed(0)) * spread
    pool = MemoryPool(tmp_path)
    train, test = draw[:100] + means, draw[100:] + means
    pool.put("a", {"keys": train.reshape(-1, WIDTH), "key_class": torch.arange(2).repeat(100)}, [0, 1])
    right = {}
    metric: Any
    for metric in ("l2", "mahalanobis"):
        found = AdapterIndex.build(pool, metric=metric).search_features(test.reshape(-1, WIDTH), 1)
        right[metric] = float((found.labels[:, 0] == torch.arange(2).repeat(100)).float().mean())
    assert right["mahalanobis"] > 0.99 > 0.8 > right["l2"]


def test_mahalanobis_needs_features(pool: MemoryPool) -> None:
    for record in pool.records:
        pool.put(record.id, knowledge_of(list(record.labels), n=1), list(record.labels))
    with pytest.raises(DataError, match="Take metric='cosine'"):
        AdapterIndex.build(pool, metric="mahalanobis")
    few = MemoryPool(pool.path)
    few.put("a", knowledge_of([0], n=3), [0])  # fewer features than dimensions: shrinkage makes it invertible
    assert AdapterIndex.build(few, metric="mahalanobis").query(features(0, 1), 1)[0][0].score > -1e6


def test_keys_come_from_the_knowledge(pool: MemoryPool) -> None:
    one = AdapterIndex.build(pool, keys="centroids", per_class=1)
    assert torch.equal(
        one.search_features(QUERIES, 9).scores, AdapterIndex.build(pool).search_features(QUERIES, 9).scores
    )
    pair = torch.cat([features(0, 30) + 20, features(0, 30) - 20])
    pool.put("two", {"keys": pair, "key_class": torch.zeros(60, dtype=torch.long)}, [77])
    index = AdapterIndex.build(pool, keys="centroids", per_class=2, metric="l2")
    means = torch.stack([pair[:30].mean(0), pair[30:].mean(0)])
    assert all(hits[0].score > -1e-6 and hits[0].label == 77 for hits in index.query(means, 1))
    drawn = AdapterIndex.build(pool, keys="features", per_class=3, metric="l2", seed=1)
    assert len(drawn) == 3 * 11
    every = pool.knowledge("task-001")["keys"]
    own = drawn.search_features(every, 1, records=["task-001"]).scores[:, 0]
    assert int((own == 0).sum()) == 6  # each key is a feature, to the bit


def test_deterministic_and_of_the_seed(pool: MemoryPool) -> None:
    def draw(seed: int) -> torch.Tensor:
        return AdapterIndex.build(pool, keys="features", per_class=2, seed=seed).search_features(QUERIES, 20).scores

    state = torch.get_rng_state()
    assert torch.equal(draw(0), draw(0)) and not torch.equal(draw(0), draw(1))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("backend", indexes.names())
def test_filters(pool: MemoryPool, backend: str) -> None:
    index = AdapterIndex.build(pool, backend=backend)
    for hits in index.query(QUERIES, 10, tags=["even", "all"]):
        assert sorted(hit.label for hit in hits) == [0, 1, 4, 5, 8, 9]
    for hits in index.query(QUERIES, 10, records=["task-001"]):
        assert {hit.record for hit in hits} == {"task-001"} and len(hits) == 2
    assert index.query(QUERIES[:1], 3, tags=["even"], records=["task-001"]) == [[]]
    assert index.query(QUERIES[:1], 3, tags=["never given"]) == [[]]
    pool.retag("task-001", "even")  # tags are those of the pool now
    assert len(index.query(QUERIES[:1], 10, tags=["even"])[0]) == 8
    with pytest.raises(UnknownName, match="did you mean 'task-001'"):
        index.query(QUERIES, 1, records=["task-01"])


@pytest.mark.parametrize("backend", indexes.names())
def test_add_and_remove_are_as_if_built_so(pool: MemoryPool, backend: str) -> None:
    index = AdapterIndex.build(pool, backend=backend)
    index.remove(["task-001", "task-003"])
    assert {hit.record for hits in index.query(QUERIES, 10) for hit in hits} == {"task-000", "task-002", "task-004"}
    pool.drop("task-003")
    pool.put("new", knowledge_of([20, 21]), [20, 21])
    index.add(["new", "task-001"])
    assert not index.changes()
    fresh = AdapterIndex.build(pool, backend=backend)
    assert len(index) == len(fresh) == 10
    assert labels_found(index) == labels_found(fresh)
    if indexes.get(backend).exact:
        for mine, other in zip(index.query(QUERIES, 5), fresh.query(QUERIES, 5), strict=True):
            assert [(hit.record, hit.label) for hit in mine] == [(hit.record, hit.label) for hit in other]
            assert [hit.score for hit in mine] == pytest.approx([hit.score for hit in other], abs=1e-6)
    with pytest.raises(DataError, match="already"):
        index.add(["new"])
    with pytest.raises(UnknownName, match="unknown adapter 'old'"):
        index.add(["old"])
    with pytest.raises(UnknownName, match="of the index"):
        index.remove(["new", "task-003"])
    assert len(index) == 10


def test_empty_pool_then_grown(pool: MemoryPool, tmp_path: Path) -> None:
    empty = MemoryPool(tmp_path / "other")
    index = AdapterIndex.build(empty, metric="mahalanobis")
    assert index.query(QUERIES, 3) == [[]] * 30 and len(index) == 0
    index.save()
    index = AdapterIndex.open(None, empty)
    for record in pool.records:
        empty.put(record.id, pool.knowledge(record.id), list(record.labels))
    index.add(["task-000"])
    index.refresh()
    assert labels_found(index) == LABELS.tolist()
    index.remove([record.id for record in pool.records])
    assert index.query(QUERIES, 3) == [[]] * 30
    index.add(["task-001"])
    assert len(index.query(QUERIES, 3)[0]) == 2


def test_one_label_in_two_records(pool: MemoryPool) -> None:
    pool.put("merged", knowledge_of([0, 2]), [0, 2])
    first, second = AdapterIndex.build(pool).query(features(0, 1, seed=9), 2)[0]
    assert {first.record, second.record} == {"task-000", "merged"} and first.label == second.label == 0
    assert first.score == second.score


def test_records_without_features_are_named(pool: MemoryPool) -> None:
    pool.put("bare", {}, [50])
    with pytest.warns(UserWarning, match="bare"):
        index = AdapterIndex.build(pool)
    stats = index.stats()
    assert stats.without_keys == ("bare",) and stats.records == 6 and stats.keys == stats.classes == 10
    assert stats.bytes_per_key == stats.nbytes / 10 and not stats.changes


def test_tags_choose_what_is_covered(pool: MemoryPool) -> None:
    index = AdapterIndex.build(pool, tags=["even"])
    assert index.records == ("task-000", "task-002", "task-004") and not index.changes()
    pool.retag("task-001", "even")
    pool.retag("task-000")
    assert index.changes().added == ("task-001",) and index.changes().removed == ("task-000",)
    assert index.refresh()
    assert set(index.records) == {"task-001", "task-002", "task-004"}


def test_images_go_through_the_bare_backbone(pool: MemoryPool) -> None:
    index = AdapterIndex.build(pool)
    assert index.query(QUERIES.view(-1, 1, 3, 4), 2) == index.query(QUERIES, 2)
    assert index.query(QUERIES.numpy().astype(np.float64), 2) == index.query(QUERIES, 2)


def test_bad_queries(pool: MemoryPool) -> None:
    index = AdapterIndex.build(pool)
    with pytest.raises(DataError, match=r"\[N, 12\].*\[30, 11\]"):
        index.query(QUERIES[:, 1:])
    broken = QUERIES.clone()
    broken[4, 4] = float("nan")
    with pytest.raises(DataError, match="row 4 is not finite"):
        index.query(broken)
    with pytest.raises(ConfigError, match="at least 1"):
        index.query(QUERIES, 0)
    assert index.query(QUERIES[:0], 3) == []
    assert index.query(torch.zeros(1, WIDTH), 1)[0][0].score == 0  # no direction: equally far from everything


def test_bad_choices(pool: MemoryPool) -> None:
    for options, message in (
        ({"keys": "means"}, "prototypes, centroids, features"),
        ({"metric": "euclid"}, "cosine, ip, l2, mahalanobis"),
        ({"backend": "hsnw"}, "did you mean 'hnsw'"),
        ({"backend": "ivf", "options": {"probe": 3}}, "did you mean 'probes'"),
        ({"backend": "ivf", "options": {"probes": 0}}, "at least 1"),
        ({"backend": "ivfpq", "options": {"parts": 5}}, "divide the width 12"),
        ({"options": {"probes": 3}}, "name it"),
        ({"per_class": 2}, "one prototype"),
        ({"keys": "features", "per_class": 0}, "at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            AdapterIndex.build(pool, **options)
    pool.put("wrong", {"keys": torch.randn(3, 5), "key_class": torch.zeros(3, dtype=torch.long)}, [0])
    with pytest.raises(DataError, match="'wrong'"):
        AdapterIndex.build(pool)


def test_auto_grows_out_of_its_back_end(pool: MemoryPool, monkeypatch: pytest.MonkeyPatch) -> None:
    assert [choose(n, 384) for n in (0, 10_000, 11_000, 10**6)] == ["flat", "flat", "ivf", "ivf"]
    index = AdapterIndex.build(pool)
    assert index.stats().backend == "flat"
    monkeypatch.setattr("cl_adapters.index.contents.SCANNED", 10 * WIDTH)
    pool.put("more", knowledge_of([30]), [30])
    index.add(["more"])
    assert index.stats().backend == "ivf" and labels_found(index) == LABELS.tolist()


def test_without_faiss(pool: MemoryPool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert AdapterIndex.build(pool).stats().backend == "exact"
    with pytest.warns(UserWarning, match="pip install faiss-cpu"):
        assert choose(10**6, 384) == "exact"


def test_more_neighbours_than_keys(pool: MemoryPool) -> None:
    index = AdapterIndex.build(pool)
    for classes in (False, True):
        assert index.query(QUERIES, 10**12, classes=classes) == index.query(QUERIES, 10, classes=classes)
    assert index.query(QUERIES, np.int64(2)) == index.query(QUERIES, 2)  # type: ignore[arg-type]
    assert index.search_features(QUERIES, 12).scores.shape == (30, 12)
    assert bool((index.search_features(QUERIES, 12).records[:, 10:] == -1).all())
    empty = AdapterIndex.build(MemoryPool(pool.path))
    assert empty.query(QUERIES, 10**12) == [[]] * 30
    for wrong in (0, -1, 2.0, "3", None, True):
        for one in (index, empty):
            with pytest.raises(ConfigError, match=r"k has to be a whole number, at least 1; got"):
                one.query(QUERIES, wrong)  # type: ignore[arg-type]
            with pytest.raises(ConfigError, match=r"k has to be a whole number, at least 1; got"):
                one.search_features(QUERIES, wrong, classes=True)  # type: ignore[arg-type]


def centroids_of(label: int, counts: tuple[int, ...]) -> tuple[dict[str, Tensor], Tensor]:
    """Knowledge of one class whose keys are the centroids of groups of features far apart; and those features."""
    groups = [features(label, n, seed=5 + place) + 4 * place for place, n in enumerate(counts)]
    knowledge = {
        "keys": torch.stack([group.mean(0) for group in groups]),
        "key_class": torch.zeros(len(counts), dtype=torch.long),
        "key_size": torch.tensor(counts),
    }
    return knowledge, torch.cat(groups)


def test_centroids_in_the_pool_count_as_often_as_they_stand_for(tmp_path: Path) -> None:
    pool = MemoryPool(tmp_path)
    knowledge, f = centroids_of(0, (90, 10))
    pool.put("a", knowledge, [0])
    index = AdapterIndex.build(pool, metric="l2")
    (hit,) = index.query(f.mean(0, keepdim=True), 1)[0]
    assert hit.score == pytest.approx(0, abs=1e-6), "the prototype is the mean of the features"
    knowledge, f = centroids_of(0, (40, 5, 5, 50))
    pool.put("a", knowledge, [0])
    clusters = AdapterIndex.build(pool, metric="l2", keys="centroids", per_class=2)
    low, high = f[:45].mean(0), f[45:].mean(0)
    for mean in (low, high):
        assert clusters.query(mean[None], 1)[0][0].score == pytest.approx(0, abs=1e-6)


def test_no_covariance_of_centroids(tmp_path: Path) -> None:
    pool = MemoryPool(tmp_path)
    pool.put("a", knowledge_of([0]), [0])
    pool.put("b", centroids_of(1, (90, 10))[0], [1])
    keys: Any
    for keys in ("prototypes", "features"):
        with pytest.raises(DataError, match=r"'b' keeps centroids of class 1.*Train with keys='features'"):
            AdapterIndex.build(pool, metric="mahalanobis", keys=keys)
    pool.put("b", centroids_of(1, (1, 1, 1))[0], [1])  # so few features that each is its own centroid
    assert len(AdapterIndex.build(pool, metric="mahalanobis")) == 2
