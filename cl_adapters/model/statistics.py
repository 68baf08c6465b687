"""Class statistics: one Gaussian per class in feature space, to replay old classes without their images."""

from __future__ import annotations

import math
import warnings
from abc import ABC, abstractmethod
from typing import ClassVar, Literal

import torch
from torch import Tensor

from cl_adapters.errors import DataError

Covariance = Literal["full", "diagonal", "low_rank"]


class ClassStatistics(ABC):
    """Gaussians N(mu_c, Sigma_c), one per class, in the order in which classes were added.

    Sigma_c is the unbiased covariance plus ``ridge`` on the diagonal (MOS: 1e-4). A class of one image has no
    covariance: it gets the ridge alone, with a warning.

    Args:
        width: D of the features.
        ridge: added to the diagonal.
    """

    kind: ClassVar[Covariance]

    def __init__(self, width: int, ridge: float = 1e-4) -> None:
        self.ridge = ridge
        self.means_CD = torch.empty(0, width)
        self.spreads: list[Tensor] = []
        self._factors: dict[int, Tensor] = {}

    @staticmethod
    def of_kind(kind: Covariance, width: int) -> ClassStatistics:
        """Make empty statistics of that kind.

        Raises:
            DataError: unknown kind.
        """
        kinds: dict[str, type[ClassStatistics]] = {c.kind: c for c in (FullGaussian, DiagonalGaussian, LowRankGaussian)}
        if kind not in kinds:
            raise DataError(f"unknown covariance {kind!r}; known: {', '.join(kinds)}")
        return kinds[kind](width)

    @property
    def num_classes(self) -> int:
        """Classes so far."""
        return len(self.spreads)

    def add(self, f_ND: Tensor) -> None:
        """Add one class from all its features.

        Args:
            f_ND: float [N, D], N at least 1.

        Raises:
            DataError: no feature, or one that is not finite.
        """
        f_ND = _checked(f_ND)
        if len(f_ND) == 1:
            warnings.warn("a class has one image: its covariance is the ridge alone", stacklevel=2)
        mean_D = f_ND.double().mean(0)
        centred_ND = f_ND.double() - mean_D
        self.means_CD = torch.cat([self.means_CD, mean_D.float()[None]])
        self.spreads.append(self._spread(centred_ND, max(len(f_ND) - 1, 1)).float())

    def merge(self, c: int, f_ND: Tensor, samples: int) -> None:
        """Take further features of a class that is here: the Gaussian becomes that of all of them, up to rounding.

        Source: pooling of means and scatter (Chan, Golub and LeVeque 1979, eq. 2.1).

        Args:
            c: its position.
            f_ND: float [N, D], N at least 1.
            samples: features that it was made from so far.

        Raises:
            DataError: no feature, or one that is not finite.
        """
        f_ND = _checked(f_ND)
        total = samples + len(f_ND)
        mean_D, old_D = f_ND.double().mean(0), self.means_CD[c].double()
        apart_D = math.sqrt(samples * len(f_ND) / total) * (mean_D - old_D)
        rows_MD = torch.cat([f_ND.double() - mean_D, apart_D[None]])
        share = max(samples - 1, 1) / (total - 1)
        self.means_CD = self.means_CD.clone()
        self.means_CD[c] = old_D.lerp(mean_D, len(f_ND) / total)
        self.spreads[c] = self._joined(self.spreads[c].double(), share, self._spread(rows_MD, total - 1)).float()
        self._factors.pop(c, None)

    def sample(self, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Draw n features of every class.

        Returns:
            features float32 [C * n, D] and class positions int64 [C * n], class by class.
        """
        drawn = [self._draw(c, n, generator) for c in range(self.num_classes)]
        return torch.cat(drawn), torch.arange(self.num_classes).repeat_interleave(n)

    def tensors(self) -> dict[str, Tensor]:
        """Everything to save."""
        return {"means": self.means_CD} | {f"spread.{i}": spread for i, spread in enumerate(self.spreads)}

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Replace the content by saved tensors."""
        self.means_CD = tensors["means"]
        self.spreads = [tensors[f"spread.{i}"] for i in range(len(self.means_CD))]
        self._factors = {}

    @abstractmethod
    def _spread(self, centred_ND: Tensor, degrees: int) -> Tensor:
        """What is stored of the centred features (float64)."""

    @abstractmethod
    def _joined(self, spread: Tensor, share: float, new: Tensor) -> Tensor:
        """What is stored of a class: ``share`` of the covariance of ``spread``, and that of ``new`` (both float64)."""

    @abstractmethod
    def _draw(self, c: int, n: int, generator: torch.Generator) -> Tensor:
        """n features of class c, [n, D]."""


class FullGaussian(ClassStatistics):
    """Full covariance [D, D]. Samples are ``mu + eps L^T`` with the Cholesky factor L, kept after its first use.

    One matrix product per class: ``MultivariateNormal.sample`` does n matrix-vector products instead.
    """

    kind: ClassVar[Covariance] = "full"

    def _spread(self, centred_ND: Tensor, degrees: int) -> Tensor:
        covariance = centred_ND.T @ centred_ND / degrees
        return covariance + self.ridge * torch.eye(len(covariance), dtype=covariance.dtype)

    def _joined(self, spread: Tensor, share: float, new: Tensor) -> Tensor:
        return new + share * (spread - self.ridge * torch.eye(len(new), dtype=new.dtype))

    def _draw(self, c: int, n: int, generator: torch.Generator) -> Tensor:
        if c not in self._factors:
            self._factors[c] = torch.linalg.cholesky(self.spreads[c].double()).float().T.contiguous()
        eps_ND = torch.randn(n, self.means_CD.shape[1], generator=generator)
        return torch.addmm(self.means_CD[c], eps_ND, self._factors[c])


class DiagonalGaussian(ClassStatistics):
    """Variances only, [D] (MOS uses it for ImageNet-A, whose classes are small)."""

    kind: ClassVar[Covariance] = "diagonal"

    def _spread(self, centred_ND: Tensor, degrees: int) -> Tensor:
        return centred_ND.square().sum(0) / degrees + self.ridge

    def _joined(self, spread: Tensor, share: float, new: Tensor) -> Tensor:
        return new + share * (spread - self.ridge)

    def _draw(self, c: int, n: int, generator: torch.Generator) -> Tensor:
        eps_ND = torch.randn(n, self.means_CD.shape[1], generator=generator)
        return self.means_CD[c] + eps_ND * self.spreads[c].sqrt()


class LowRankGaussian(ClassStatistics):
    """The same law as :class:`FullGaussian` from the N centred features themselves, [N, D]: cheaper where N < D.

    ``mu + z X / sqrt(N - 1) + sqrt(ridge) eps``. It stores features of the training images, so it is not for
    settings where that is not allowed.
    """

    kind: ClassVar[Covariance] = "low_rank"

    def _spread(self, centred_ND: Tensor, degrees: int) -> Tensor:
        return centred_ND / math.sqrt(degrees)

    def _joined(self, spread: Tensor, share: float, new: Tensor) -> Tensor:
        return torch.cat([math.sqrt(share) * spread, new])

    def _draw(self, c: int, n: int, generator: torch.Generator) -> Tensor:
        rows_ND = self.spreads[c]
        z = torch.randn(n, len(rows_ND), generator=generator)
        eps_ND = torch.randn(n, rows_ND.shape[1], generator=generator)
        drawn: Tensor = torch.addmm(self.means_CD[c], z, rows_ND).add_(eps_ND, alpha=self.ridge**0.5)
        return drawn


def _checked(f_ND: Tensor) -> Tensor:
    """Features as float32 on the CPU.

    Raises:
        DataError: none, or one that is not finite.
    """
    f_ND = f_ND.detach().float().cpu()
    if not len(f_ND):
        raise DataError("a class without any image has no statistics")
    if not torch.isfinite(f_ND).all():
        raise DataError("features are not finite; check the images and the learning rate")
    return f_ND
