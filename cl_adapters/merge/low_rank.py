"""Low-rank matrices as factors: the best approximation of a given rank, and what it loses.

Sums of low-rank matrices are handled by their factors, sum_i B_i A_i = [B_1 .. B_T] [A_1; ..; A_T]. Averaging the A and
the B apart is another thing and wrong: the product of the means has the cross terms B_i A_j.

Shape letters: O rows, D columns, R rank.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Truncated:
    """The nearest matrix of some rank, as B A with balanced factors (A A^T = B^T B).

    Attributes:
        a_RD, b_OR: float64.
        norm: Frobenius norm of the matrix before the truncation.
        lost: Frobenius norm of what the truncation removed.
    """

    a_RD: Tensor
    b_OR: Tensor
    norm: float
    lost: float


def truncate_product(a_RD: Tensor, b_OR: Tensor, rank: int) -> Truncated:
    """Best approximation of B A, without forming it: QR of both factors and the SVD of the small core.

    Args:
        a_RD: [R, D].
        b_OR: [O, R].
        rank: of the result; where the product has less, zeros fill the rest.
    """
    q_b, r_b = torch.linalg.qr(b_OR.double())
    q_a, r_a = torch.linalg.qr(a_RD.double().mT)
    return _truncate(r_b @ r_a.mT, rank, q_b, q_a)


def truncate_matrix(matrix_OD: Tensor, rank: int) -> Truncated:
    """Best approximation of a matrix [O, D]."""
    return _truncate(matrix_OD.double(), rank)


def _truncate(matrix: Tensor, rank: int, q_b: Tensor | None = None, q_a: Tensor | None = None) -> Truncated:
    """Of ``matrix``, or of ``q_b matrix q_a^T`` with orthonormal columns in both."""
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    root = s[:rank].sqrt()
    b_OR = u[:, :rank] * root
    a_RD = root.unsqueeze(1) * vh[:rank]
    if q_b is not None and q_a is not None:
        b_OR, a_RD = q_b @ b_OR, a_RD @ q_a.mT
    missing = rank - len(root)
    if missing > 0:
        b_OR = torch.cat([b_OR, b_OR.new_zeros(len(b_OR), missing)], 1)
        a_RD = torch.cat([a_RD, a_RD.new_zeros(missing, a_RD.shape[1])])
    return Truncated(a_RD, b_OR, math.sqrt(float(s.square().sum())), math.sqrt(float(s[rank:].square().sum())))
