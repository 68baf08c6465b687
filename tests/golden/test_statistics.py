"""Class Gaussians: unbiased covariance + 1e-4 I; samples mu + L eps for given normals.

Origin: MOS, released code (statistics of models/base.py; samples of MultivariateNormal). Expected values are NumPy.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
import torch

from cl_adapters.model.statistics import ClassStatistics, DiagonalGaussian, FullGaussian, LowRankGaussian

Array = npt.NDArray[np.float64]


@pytest.fixture
def features() -> Array:
    return np.random.default_rng(5).standard_normal((10, 4)) * [1.0, 2.0, 0.5, 1.0] + [0.0, 1.0, 2.0, 3.0]


def covariance(features: Array) -> Array:
    centred = features - features.mean(0)
    unbiased: Array = centred.T @ centred / (len(features) - 1)
    return unbiased + 1e-4 * np.eye(features.shape[1])


def filled(cls: type[ClassStatistics], *classes: Array) -> ClassStatistics:
    statistics = cls(classes[0].shape[1])
    for features in classes:
        statistics.add(torch.from_numpy(features))
    return statistics


def test_unbiased_covariance_with_ridge(features: Array) -> None:
    statistics = filled(FullGaussian, features)
    assert np.allclose(statistics.means_CD[0], features.mean(0), rtol=1e-6)
    assert np.allclose(statistics.spreads[0], covariance(features), rtol=1e-6)
    biased = np.cov(features.T, bias=True)
    assert not np.allclose(statistics.spreads[0], biased, rtol=1e-2)


def test_samples_are_mean_plus_factor_times_normals(features: Array) -> None:
    """With the same standard normals, mu + L eps, L the lower Cholesky factor; two classes, one after the other."""
    other = features[:, ::-1] * 0.3 - 1
    statistics = filled(FullGaussian, features, other)
    drawn, labels = statistics.sample(6, torch.Generator().manual_seed(9))
    generator = torch.Generator().manual_seed(9)
    for c, part in enumerate((features, other)):
        eps = torch.randn(6, 4, generator=generator).double().numpy()
        wanted = part.mean(0) + eps @ np.linalg.cholesky(covariance(part)).T
        assert np.abs(drawn[labels == c].numpy() - wanted).max() < 2e-6
    assert labels.tolist() == [0] * 6 + [1] * 6


def test_diagonal_keeps_the_variances_only(features: Array) -> None:
    statistics = filled(DiagonalGaussian, features)
    variance = np.diag(covariance(features))
    assert statistics.spreads[0].shape == (4,)
    assert np.allclose(statistics.spreads[0], variance, rtol=1e-6)
    drawn, _ = statistics.sample(5, torch.Generator().manual_seed(9))
    eps = torch.randn(5, 4, generator=torch.Generator().manual_seed(9)).double().numpy()
    assert np.abs(drawn.numpy() - (features.mean(0) + eps * np.sqrt(variance))).max() < 1e-6


@pytest.mark.parametrize("cls", [FullGaussian, LowRankGaussian])
def test_low_rank_has_the_law_of_the_full_one(cls: type[ClassStatistics], features: Array) -> None:
    """80,000 draws: mean and covariance within four standard errors, and clearly not the biased covariance."""
    few = features[:3]  # fewer images than dimensions: the covariance has rank 2, plus the ridge
    n = 80_000
    drawn, _ = filled(cls, few).sample(n, torch.Generator().manual_seed(1))
    sample: Array = drawn.double().numpy()
    wanted = covariance(few)
    variance = np.diag(wanted)
    assert (np.abs(sample.mean(0) - few.mean(0)) < 4 * np.sqrt(variance / n)).all()
    found = np.cov(sample.T)
    error = np.sqrt((np.outer(variance, variance) + wanted**2) / n)
    assert (np.abs(found - wanted) < 4 * error).all()
    # the ridge is seen where the rank is missing: the smallest eigenvalue is 1e-4, not 0
    assert np.linalg.eigvalsh(found)[0] == pytest.approx(1e-4, rel=0.05)
    assert (np.abs(found - wanted * 2 / 3) > 4 * error).any()


def test_saved_tensors_give_the_same_draws(features: Array) -> None:
    for cls in (FullGaussian, DiagonalGaussian, LowRankGaussian):
        statistics = filled(cls, features, features + 1)
        again = cls(4)
        again.load(statistics.tensors())
        first, second = (s.sample(3, torch.Generator().manual_seed(0))[0] for s in (statistics, again))
        assert torch.equal(first, second)
        assert again.num_classes == 2
