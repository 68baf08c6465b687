"""From features to the vectors that a back-end compares: four metrics become inner product or squared distance.

    cosine        f / |f|                            inner product: the cosine, in [-1, 1]
    ip            f                                  inner product
    l2            f - m                              minus the squared distance
    mahalanobis   (f - m) W, with W W^T = Sigma^-1   minus the squared Mahalanobis distance

m is the mean of the keys when the index was built: distances do not change by it, their rounding errors shrink. Sigma
is the covariance within classes, pooled over all of them (Lee et al. 2018, "A simple unified framework for detecting
out-of-distribution samples", eq. 2), with the shrinkage of Ledoit and Wolf (2004) towards a multiple of the identity,
which vanishes where there are many features.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal, TypeAlias, get_args

import numpy as np
import numpy.typing as npt

from cl_adapters.errors import ConfigError, DataError
from cl_adapters.index.backends.base import Floats, Metric

Similarity = Literal["cosine", "ip", "l2", "mahalanobis"]
Doubles: TypeAlias = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Space:
    """How features are compared.

    Attributes:
        similarity: see above.
        mean_D: float32 [D], m; zeros where it is not used.
        whitening_DD: float32 [D, D], W; None but for Mahalanobis.
        shrinkage: share of the identity in Sigma.
    """

    similarity: Similarity
    mean_D: Floats
    whitening_DD: Floats | None = field(default=None, repr=False)
    shrinkage: float = 0.0

    @property
    def metric(self) -> Metric:
        """What the back-end computes."""
        return "ip" if self.similarity in ("cosine", "ip") else "l2"

    def project(self, f_ND: Floats) -> Floats:
        """Vectors for the back-end.

        Args:
            f_ND: float32 [N, D].

        Returns:
            float32 [N, D]. Under "cosine" a feature of zeros stays one, and scores 0 with everything.
        """
        if self.similarity == "cosine":
            length_N1 = np.sqrt(np.einsum("nd,nd->n", f_ND, f_ND, dtype=np.float64))[:, None]
            unit: Floats = (f_ND / np.maximum(length_N1, np.finfo(np.float32).tiny)).astype(np.float32)
            return unit
        if self.similarity == "ip":
            return f_ND
        centred: Floats = f_ND - self.mean_D
        if self.whitening_DD is not None:
            centred = centred @ self.whitening_DD
        return centred


def check_similarity(similarity: str) -> None:
    """Check the name of a metric.

    Raises:
        ConfigError: it is none.
    """
    if similarity not in get_args(Similarity):
        raise ConfigError(f"unknown metric {similarity!r}; known: {', '.join(get_args(Similarity))}")


def fit_space(similarity: Similarity, keys_MD: Floats, classes: Iterable[Floats]) -> Space:
    """The space of an index.

    Args:
        similarity: metric.
        keys_MD: float32 [M, D], the keys before projection, M at least 1.
        classes: features float32 [n, D] of one class each; read for Mahalanobis only.

    Raises:
        DataError: no class has two features, so there is no covariance.
    """
    width = keys_MD.shape[1]
    if similarity in ("cosine", "ip"):
        return Space(similarity=similarity, mean_D=np.zeros(width, np.float32))
    mean_D: Floats = keys_MD.mean(0, dtype=np.float64).astype(np.float32)
    if similarity == "l2":
        return Space(similarity=similarity, mean_D=mean_D)
    covariance_DD, shrinkage = pooled_covariance(classes, width)
    # Sigma = L L^T, so that |L^-1 (x - y)|^2 is the distance; W is the transpose of L^-1.
    factor_DD = np.linalg.cholesky(covariance_DD)
    whitening_DD = np.linalg.solve(factor_DD, np.eye(width)).T.astype(np.float32)
    return Space(
        similarity=similarity,
        mean_D=mean_D,
        whitening_DD=np.ascontiguousarray(whitening_DD),
        shrinkage=shrinkage,
    )


def pooled_covariance(classes: Iterable[Floats], width: int) -> tuple[Doubles, float]:
    """Covariance within classes, shrunk.

    Ledoit and Wolf 2004, eq. 14, for centred features: with S = X^T X / n, mu = tr(S) / D, d2 = |S - mu I|^2 / D and
    b2 = min(d2, (sum |x|^4 / n - |S|^2) / (n D)), the result is b2/d2 mu I + (1 - b2/d2) S.

    Args:
        classes: features float32 [n, D], one array per class.
        width: D.

    Returns:
        float64 [D, D], positive definite, and the share b2/d2 of the identity.

    Raises:
        DataError: no class has two different features.
    """
    scatter_DD, fourth, n, free = np.zeros((width, width)), 0.0, 0, 0
    for f_ND in classes:
        x_ND = f_ND.astype(np.float64) - f_ND.mean(0, dtype=np.float64)
        scatter_DD += x_ND.T @ x_ND
        fourth += float((np.square(x_ND).sum(1) ** 2).sum())
        n, free = n + len(x_ND), free + len(x_ND) - 1
    level = float(np.trace(scatter_DD)) / width
    if free < 1 or not level > 0:
        raise DataError(
            "metric 'mahalanobis' needs several different features per class in the pool's knowledge, for the "
            "covariance within classes; there is at most one. Take metric='cosine', or store features as keys"
        )
    s_DD, mu = scatter_DD / n, level / n
    squares = float(np.square(s_DD).sum())
    distance = squares / width - mu * mu
    noise = (fourth / n - squares) / (n * width)
    share = 1.0 if distance <= 0 else min(1.0, max(0.0, noise / distance))
    # A direction in which no class varies would make every difference along it infinite.
    share = max(share, 1e-6)
    shrunk_DD = (1 - share) * s_DD + share * mu * np.eye(width)
    return shrunk_DD * (n / free), share
