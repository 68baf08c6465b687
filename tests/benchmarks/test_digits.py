"""The embedded digits: all of them, as scikit-learn has them, split the same way every time."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.datasets import load_digits

from cl_adapters.benchmarks.base import arrival_order
from cl_adapters.benchmarks.data.digits import Digits
from cl_adapters.errors import ConfigError, DataError


def test_counts_and_pixels_are_those_of_scikit_learn() -> None:
    data, source = Digits().load(0), load_digits()
    assert len(data.train) + len(data.test) == 1797
    assert data.classes == tuple("0123456789")
    for part in (data.train, data.test):
        images = np.asarray(part.images)
        assert images.shape == (len(part), 8, 8, 3)
        assert images.dtype == np.uint8
        assert images.min() == 0
        assert images.max() == 255
        for image, label, name in zip(images, part.labels, part.names, strict=True):
            row = int(name.rsplit("/", 1)[1])
            assert source.target[row] == label
            np.testing.assert_allclose(image[..., 1] * (16 / 255), source.images[row], atol=0.04)


def test_split_is_disjoint_stratified_and_independent_of_the_seed() -> None:
    data, again = Digits().load(0), Digits(tasks=2).load(7)
    assert not set(data.train.names) & set(data.test.names)
    assert len(set(data.train.names) | set(data.test.names)) == 1797
    assert list(again.test.names) == list(data.test.names)
    share = np.bincount(data.test.labels) / (np.bincount(data.test.labels) + np.bincount(data.train.labels))
    np.testing.assert_allclose(share, 0.25, atol=0.01)


def test_order_comes_from_the_run_unless_fixed() -> None:
    assert Digits().load(3).class_order == arrival_order(10, 3) != Digits().load(4).class_order
    assert Digits(order_seed=1993).load(3).class_order == Digits(order_seed=1993).load(4).class_order
    assert arrival_order(10, 1993) == tuple(np.random.RandomState(1993).permutation(10))


def test_uneven_tasks() -> None:
    data = Digits(tasks=3).load(0)
    assert data.task_sizes == (4, 3, 3)
    assert sorted(label for task in data.tasks for label in task) == list(range(10))


@pytest.mark.parametrize("tasks", [0, 11, -1])
def test_impossible_number_of_tasks(tasks: int) -> None:
    with pytest.raises(ConfigError, match=f"tasks must be between 1 and the number of classes 10, got {tasks}"):
        Digits(tasks=tasks).load(0)


def test_impossible_seed_of_the_order() -> None:
    with pytest.raises(ConfigError, match=r"seed of the class order must lie between 0 and .* got -1"):
        Digits(order_seed=-1).load(0)


def test_digits_are_never_mirrored() -> None:
    assert Digits().load(0).augmentation.flip is False


def test_another_scikit_learn_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    shorter = load_digits()
    shorter.images, shorter.target = shorter.images[:-1], shorter.target[:-1]
    monkeypatch.setattr("sklearn.datasets.load_digits", lambda: shorter)
    with pytest.raises(DataError, match="expected 1797 images"):
        Digits().load(0)
