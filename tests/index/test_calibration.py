"""Thresholds of an index: from held-back features of known classes, or of unknown ones; and what they refuse."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cl_adapters import AdapterIndex
from cl_adapters.errors import ConfigError, DataError
from cl_adapters.index.calibration import calibrate, unknown_scores
from tests.index.conftest import QUERIES, MemoryPool, features, knowledge_of


def with_held_out(labels: list[int], n: int = 10) -> dict[str, Tensor]:
    """Knowledge of these classes with n held-back features each."""
    held = {
        "held_out": torch.cat([features(label, n, seed=5) for label in labels]),
        "held_out_class": torch.arange(len(labels)).repeat_interleave(n),
    }
    return knowledge_of(labels) | held


@pytest.fixture
def held(pool: MemoryPool) -> MemoryPool:
    """The pool with ten held-back features per class."""
    for record in pool.records:
        pool.put(record.id, with_held_out(list(record.labels)), list(record.labels), record.tags)
    return pool


def cosines(held: MemoryPool, label: int, others: list[int]) -> Tensor:
    """Cosine of each held-back feature of a class to the nearest prototype of these, by hand."""
    means = torch.stack([features(other, 20).mean(0) for other in others])
    return torch.stack([F.cosine_similarity(f[None], means).amax() for f in features(label, 10, seed=5)])


def test_the_unknown_are_the_adapters_without_a_common_class(held: MemoryPool) -> None:
    index = AdapterIndex.build(held)
    wanted = [cosines(held, label, [other for other in range(10) if other // 2 != label // 2]) for label in range(10)]
    scores = unknown_scores(index)
    assert torch.allclose(scores, torch.cat(wanted), atol=1e-5)
    threshold = calibrate(index, false_accept=0.2)
    assert threshold == index.threshold
    assert int((scores >= threshold).sum()) == 19, "0.2 * 101 is 20, so at most 19 reach it"
    held.put("again", with_held_out([0, 11]), [0, 11])  # knows class 0 too, so task-000 is not unknown to it
    index.refresh()
    found = unknown_scores(index)
    assert torch.allclose(found[:10], cosines(held, 0, list(range(2, 10))), atol=1e-5)
    assert torch.allclose(found[-10:], cosines(held, 11, list(range(2, 10))), atol=1e-5)
    assert torch.allclose(found[20:30], cosines(held, 2, [0, 1, *range(4, 10), 11]), atol=1e-5)


def test_the_two_rates_pull_the_threshold_apart(held: MemoryPool) -> None:
    index = AdapterIndex.build(held)
    known = index.search_features(torch.cat([features(label, 10, seed=5) for label in range(10)]), 1).scores[:, 0]
    strict, loose = calibrate(index, 0.5), calibrate(index, 0.05)
    assert int((known < strict).sum()) == 49
    assert int((known < loose).sum()) == 4
    unknown = unknown_scores(index)
    assert calibrate(index, false_accept=0.01) > unknown.max() >= calibrate(index, false_accept=0.05)


def test_filters_leave_fewer_keys_so_more_is_refused(held: MemoryPool) -> None:
    index = AdapterIndex.build(held)
    threshold = calibrate(index, 0.05)
    whole = index.search_features(QUERIES, 1).scores[:, 0] >= threshold
    assert whole.float().mean() > 0.8
    for tags, records, labels in ((["even"], None, (0, 1, 4, 5, 8, 9)), ([], ["task-001"], (2, 3))):
        hits = index.query(QUERIES, 1, tags=tags, records=records)
        ok = torch.tensor([row[0].score >= threshold for row in hits])
        own = torch.tensor([label in labels for label in range(10) for _ in range(3)])
        assert torch.equal(ok[own], whole[own])
        assert not ok[~own].any(), "their class is left out, so they are unknown"


def test_targets_that_cannot_be_kept(held: MemoryPool) -> None:
    index = AdapterIndex.build(held)
    for rates in ({}, {"false_reject": 0.1, "false_accept": 0.1}):
        with pytest.raises(ConfigError, match="give one target"):
            calibrate(index, **rates)
    with pytest.raises(ConfigError, match="between 0 and 1"):
        calibrate(index, false_accept=1.0)
    with pytest.raises(DataError, match=r"100 held-back features cannot promise a rate of 0\.005: at least 199"):
        calibrate(index, false_accept=0.005)
    alone = MemoryPool(held.path)
    alone.put("one", with_held_out([0, 1]), [0, 1])
    alone.put("two", with_held_out([1, 2]), [1, 2])
    with pytest.raises(DataError, match="two adapters without a common class"):
        calibrate(AdapterIndex.build(alone), false_accept=0.1)
    bare = MemoryPool(held.path)
    for label in (0, 1):
        bare.put(f"bare-{label}", knowledge_of([label]), [label])
    for rates in ({"false_reject": 0.1}, {"false_accept": 0.1}):
        with pytest.raises(DataError, match="0 held-back features"):
            calibrate(AdapterIndex.build(bare), **rates)
    assert index.threshold is None


def quiet(index: AdapterIndex) -> float | None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return index.threshold


def test_a_threshold_of_other_keys_is_said_to_be(held: MemoryPool) -> None:
    index = AdapterIndex.build(held)
    assert not index.threshold_stale, "there is none"
    threshold = calibrate(index, 0.05)
    held.put("more", with_held_out([20, 21]), [20, 21])
    assert quiet(index) == threshold
    for change in (lambda: index.add(["more"]), index.rebuild, index.refresh):
        index.remove(set(index.records) & {"more"})
        calibrate(index, 0.05)
        before = (index.threshold_stale, index.stats().threshold_stale)
        change()
        assert (*before, index.threshold_stale, index.stats().threshold_stale) == (False, False, True, True)
        with pytest.warns(UserWarning, match="calibrated on other keys.*calibrate it again"):
            assert index.threshold is not None
        assert quiet(index) is not None, "once"
    index.save()
    opened = AdapterIndex.open(None, held)
    assert opened.threshold_stale
    with pytest.warns(UserWarning, match="calibrated on other keys"):
        assert opened.threshold == quiet(index)
    again = calibrate(opened, 0.05)
    assert quiet(opened) == again
    opened.save()
    assert not AdapterIndex.open(None, held).threshold_stale
    held.drop("more")
    with pytest.warns(UserWarning, match="calibrated on other keys"):
        assert AdapterIndex.open(None, held, stale="refresh").threshold == again


def test_the_same_keys_under_another_covariance(held: MemoryPool) -> None:
    index = AdapterIndex.build(held, metric="mahalanobis")
    index.remove(["task-000"])
    index.rebuild()
    calibrate(index, 0.05)
    index.rebuild()
    assert quiet(index) is not None, "nothing has changed"
    held.put("more", with_held_out([20, 21]), [20, 21])
    index.add(["more"])  # the whitening stays
    calibrate(index, 0.05)
    index.rebuild()
    assert index.threshold_stale
