"""L_orth of MOS against a plain NumPy transcription (released mos.py:335-355), temperature 0.8, raw features."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
import torch

from cl_adapters.strategies.mos import orthogonality_loss

Array = npt.NDArray[np.float64]


def expected(rows: Array) -> float:
    """Mean over the rows of -log softmax(M M^T / 0.8)[i, i]."""
    total = 0.0
    for i, row in enumerate(rows):
        similarity = [float(row @ other) / 0.8 for other in rows]
        top = max(similarity)
        log_sum = top + np.log(sum(np.exp(s - top) for s in similarity))
        total += log_sum - similarity[i]
    return total / len(rows)


@pytest.fixture
def features() -> Array:
    return np.random.default_rng(3).standard_normal((3, 4))


@pytest.fixture
def means() -> Array:
    return np.random.default_rng(4).standard_normal((2, 4))


def test_two_means_and_three_features(features: Array, means: Array) -> None:
    loss = orthogonality_loss(torch.from_numpy(features), torch.from_numpy(means))
    assert loss.item() == pytest.approx(expected(np.concatenate([means, features])), rel=1e-9)
    assert loss.item() != pytest.approx(expected(features), rel=1e-2), "the means count"


def test_first_task_has_the_batch_only(features: Array) -> None:
    loss = orthogonality_loss(torch.from_numpy(features), None)
    assert loss.item() == pytest.approx(expected(features), rel=1e-9)


def test_by_hand() -> None:
    """M = [[1], [-1]]: S = [[1.25, -1.25], [-1.25, 1.25]], so the loss is log(1 + e^-2.5) = 0.0788897."""
    loss = orthogonality_loss(torch.tensor([[-1.0]]), torch.tensor([[1.0]]))
    assert loss.item() == pytest.approx(0.0788897, abs=1e-6)


def test_means_are_constants(features: Array, means: Array) -> None:
    """The gradient reaches the features, and is the one of finite differences."""
    f = torch.from_numpy(features).requires_grad_()
    orthogonality_loss(f, torch.from_numpy(means)).backward()
    assert f.grad is not None
    step = np.zeros_like(features)
    step[1, 2] = 1e-6
    up, down = (expected(np.concatenate([means, features + sign * step])) for sign in (1, -1))
    assert f.grad[1, 2].item() == pytest.approx((up - down) / 2e-6, rel=1e-5)
