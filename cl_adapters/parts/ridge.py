"""Ridge regression on randomly projected features, from sums alone: the classifier of RanPAC.

h = relu(f W)                              W [D, M] standard normal, fixed
G = sum h h^T,  S_c = sum of h of class c  over all images ever seen
logits = h (G + ridge I)^-1 S
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cl_adapters._precision import full_precision
from cl_adapters.errors import ClAdaptersError, DataError
from cl_adapters.parts.base import Part, parts

ROWS = 1024
"""Samples that are projected at a time."""


@parts.register("ridge")
class Ridge(Part):
    """A ridge classifier that learns class after class and forgets none: its sums do not depend on the order.

    Source: RanPAC (McDonnell et al. 2023), algorithm 1; released code at 698e00c, RanPAC.py, ``replace_fc``.
    The sums are float32, under autocast too; they are solved in float64, on the CPU, since not every accelerator has
    it.

    Args:
        projection_DM: W, float32 [D, M]; see :func:`random_projection`.

    Attributes:
        gram: upper triangle of G row by row, float32 [M (M + 1) / 2]: half the memory, and exactly symmetric.
        sums_CM: S, float32 [C, M], one row per class.
        weights_CM: what answers, float32 [C, M]; 0 for classes that came after the last :meth:`solve`.
        ridges: the strength of every :meth:`solve` so far.
    """

    floats = ("projection_DM", "gram", "sums_CM", "weights_CM")

    projection_DM: Tensor
    gram: Tensor
    sums_CM: Tensor
    weights_CM: Tensor

    def __init__(self, projection_DM: Tensor) -> None:
        super().__init__()
        m = projection_DM.shape[1]
        self.register_buffer("projection_DM", projection_DM)
        self.register_buffer("gram", projection_DM.new_zeros(m * (m + 1) // 2))
        self.register_buffer("sums_CM", projection_DM.new_zeros(0, m))
        self.register_buffer("weights_CM", projection_DM.new_zeros(0, m))
        self.ridges: list[float] = []

    @property
    def width(self) -> int:
        """M, the width of the projection."""
        return self.projection_DM.shape[1]

    @property
    def resolution(self) -> float:
        """What the rounding of the sums may amount to: float32 epsilon times the Frobenius norm of G.

        Every entry is off by about one rounding of its own. Measured (features of mean 0 to 3 deviations, M 20 to 2000,
        up to 300 calls of :meth:`add`), the spectral norm of the error is a half of this, where all features point one
        way, to a fortieth, where they are centred. A ridge below it does not guard against inverting noise.
        """
        packed = self.gram.cpu()
        above, diagonal = (
            float(torch.linalg.vector_norm(each, dtype=torch.float64)) for each in (packed, packed[_starts(self.width)])
        )
        return math.sqrt(2 * above**2 - diagonal**2) * torch.finfo(torch.float32).eps

    def forward(self, f_BD: Tensor) -> Tensor:
        """Logits [B, C] of features [B, D]."""
        with full_precision(self.weights_CM.device):
            return F.linear(self.expand(f_BD), self.weights_CM)

    def expand(self, f_BD: Tensor) -> Tensor:
        """relu(f W), float32 [B, M], on this part's device."""
        with full_precision(self.projection_DM.device):
            return (f_BD.to(self.projection_DM) @ self.projection_DM).relu_()

    @torch.no_grad()
    def grow(self, new_classes: int) -> None:
        """Append classes without any sample."""
        rows = self.sums_CM.new_zeros(new_classes, self.width)
        self.sums_CM = torch.cat([self.sums_CM, rows])
        self.weights_CM = torch.cat([self.weights_CM, rows])

    @torch.no_grad()
    def add(self, f_ND: Tensor, columns_N: Tensor) -> None:
        """Add samples to the sums: features float32 [N, D] of class columns int64 [N]."""
        gram_MM = self.gram.new_zeros(self.width, self.width)
        for f_BD, columns_B in zip(f_ND.split(ROWS), columns_N.split(ROWS), strict=True):
            h_BM = self.expand(f_BD)
            with full_precision(h_BM.device):
                gram_MM.addmm_(h_BM.T, h_BM)
                self.sums_CM += F.one_hot(columns_B, len(self.sums_CM)).to(h_BM).T @ h_BM
        self.gram += pack(gram_MM)

    @torch.no_grad()
    def solve(self, ridge: float) -> None:
        """Set the weights to (G + ridge I)^-1 S.

        Raises:
            ClAdaptersError: G + ridge I is not positive definite: the ridge is below the rounding of the sums.
        """
        gram_MM = unpack(self.gram.cpu().double(), self.width)
        gram_MM.diagonal().add_(ridge)
        factor_MM, failed = torch.linalg.cholesky_ex(gram_MM)
        if failed:
            raise ClAdaptersError(
                f"a ridge of {ridge:.1e} is too weak for these sums: they are rounded to about {self.resolution:.1e}, "
                f"and G + ridge I is not positive definite. Give one of at least {self.resolution:.0e}"
            )
        weights_MC = torch.cholesky_solve(self.sums_CM.cpu().double().T, factor_MM)
        self.weights_CM = weights_MC.T.to(self.sums_CM).contiguous()
        self.ridges.append(ridge)

    @torch.no_grad()
    def errors(self, f_ND: Tensor, targets_NK: Tensor, held_N: Tensor, ridges: Sequence[float]) -> Tensor:
        """Squared error of ridge regression on held-back samples, for every strength.

        All strengths share one eigendecomposition: of the Gram matrix [M, M], or of the kernel matrix [n, n] where
        there are fewer samples than projections. The sums stay as they are.

        Args:
            f_ND: features float32 [N, D].
            targets_NK: what is regressed on, [N, K].
            held_N: bool [N], the samples that are held back; the others are fitted.
            ridges: R strengths.

        Returns:
            Mean over samples and columns, float64 [R] on the CPU.
        """
        fit_ND, fit_NK = f_ND[~held_N], targets_NK[~held_N].double()
        # the weights under a strength are  toward_MQ diag(1 / (spectrum_Q + strength)) rotated_QK
        if len(fit_ND) < self.width:
            h_NM = self.expand(fit_ND).cpu().double()
            spectrum_Q, basis_NQ = torch.linalg.eigh(h_NM @ h_NM.T)
            toward_MQ, rotated_QK = h_NM.T @ basis_NQ, basis_NQ.T @ fit_NK
        else:
            gram_MM = torch.zeros(self.width, self.width, dtype=torch.float64)
            sums_MK = torch.zeros(self.width, fit_NK.shape[1], dtype=torch.float64)
            for f_BD, y_BK in zip(fit_ND.split(ROWS), fit_NK.split(ROWS), strict=True):
                h_BM = self.expand(f_BD).cpu().double()
                gram_MM.addmm_(h_BM.T, h_BM)
                sums_MK.addmm_(h_BM.T, y_BK)
            spectrum_Q, toward_MQ = torch.linalg.eigh(gram_MM)
            rotated_QK = toward_MQ.T @ sums_MK
        spectrum_Q.clamp_(min=0)  # eigenvalues that are 0 may come out a rounding below it
        total_R = torch.zeros(len(ridges), dtype=torch.float64)
        held_ND, held_NK = f_ND[held_N], targets_NK[held_N].double()
        for f_BD, y_BK in zip(held_ND.split(ROWS), held_NK.split(ROWS), strict=True):
            z_BQ = self.expand(f_BD).cpu().double() @ toward_MQ
            for i, ridge in enumerate(ridges):
                answer_BK = z_BQ @ (rotated_QK / (spectrum_Q + ridge)[:, None])
                total_R[i] += (answer_BK - y_BK).square().sum()
        return total_R / max(held_NK.numel(), 1)

    def description(self) -> dict[str, Any]:
        """The strengths so far."""
        return {"ridges": list(self.ridges)}

    def check(self, classes: int, width: int) -> None:
        """Check the shapes too."""
        super().check(classes, width)
        m = self.width
        found = [tuple(one.shape) for one in (self.projection_DM, self.gram, self.sums_CM, self.weights_CM)]
        rows = min(len(self.sums_CM), classes), m
        if found != [(width, m), (m * (m + 1) // 2,), rows, (min(len(self.weights_CM), rows[0]), m)]:
            raise DataError(f"a projection of {width} to {m} for {classes} classes has other shapes than {found}")

    @classmethod
    def restore(cls, description: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Ridge:
        """The same sums and weights."""
        made = cls(tensors["projection_DM"])
        made.gram, made.sums_CM, made.weights_CM = tensors["gram"], tensors["sums_CM"], tensors["weights_CM"]
        made.ridges = [float(ridge) for ridge in description["ridges"]]
        return made


def random_projection(width: int, projection: int, generator: torch.Generator) -> Tensor:
    """W, float32 [width, projection], standard normal (released RanPAC.py, ``setup_RP``)."""
    return torch.randn(width, projection, generator=generator)


def pack(square_MM: Tensor) -> Tensor:
    """The upper triangle [M (M + 1) / 2] of a matrix [M, M], row by row, the diagonal included."""
    return torch.cat([row_M[i:] for i, row_M in enumerate(square_MM)])


def unpack(packed: Tensor, m: int) -> Tensor:
    """The symmetric matrix [M, M] of which ``packed`` is the upper triangle."""
    square_MM = packed.new_empty(m, m)
    for i, row in enumerate(packed.split(list(range(m, 0, -1)))):
        square_MM[i, i:] = row
        square_MM[i:, i] = row
    return square_MM


def _starts(m: int) -> Tensor:
    """Places of the diagonal in a packed triangle, int64 [M]."""
    i = torch.arange(m)
    return i * m - i * (i - 1) // 2
