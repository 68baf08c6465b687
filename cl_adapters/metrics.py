"""Figures of continual learning, computed from one accuracy matrix (NumPy only).

``R`` [T, T] is the accuracy matrix: ``R[t, j]`` is the accuracy, in percent, on the test images of task ``j``
after training on task ``t``; both count from 0 and NaN stands for "not measured". ``n`` [T] is the number of
test images per task. In class-incremental learning the cells above the diagonal are NaN. Below, ``matrix`` is R,
``counts`` n, and ``curve`` the A_t [T] of :func:`average_curve`, in percent.

Sources:
    Lopez-Paz and Ranzato, "Gradient Episodic Memory for Continual Learning", NeurIPS 2017: ``R``, BWT.
    Chaudhry et al., "Riemannian Walk for Incremental Learning", ECCV 2018: forgetting.

A figure that cannot be had from the measured cells is NaN; nothing is averaged over what happens to be there.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from cl_adapters.errors import DataError

Matrix = npt.NDArray[np.float64]
Vector = npt.NDArray[np.float64]


def average_curve(matrix: npt.ArrayLike, counts: npt.ArrayLike) -> Vector:
    """Return the curve A_t: accuracy over the test images of all classes seen after task t.

    ``A_t = sum_{j<=t} n_j R[t, j] / sum_{j<=t} n_j``: every image weighs the same, so unequal tasks do not
    distort it. It equals top-1 accuracy on the joint test set of the seen classes.

    Returns:
        float64 [T], percent; NaN where a cell ``j <= t`` of the row was not measured.

    Raises:
        DataError: the matrix is not square, a value is outside 0..100, or a count is below 1.
    """
    matrix_TT, counts_T = _checked(matrix, counts)
    return np.array(
        [np.dot(counts_T[: t + 1], matrix_TT[t, : t + 1]) / counts_T[: t + 1].sum() for t in range(len(counts_T))]
    )


def average_accuracy(curve: npt.ArrayLike) -> float:
    """Return A-bar, ``mean_t A_t`` ("average incremental accuracy"), in percent; NaN if one A_t is NaN."""
    return float(np.mean(np.asarray(curve, dtype=np.float64)))


def last_accuracy(curve: npt.ArrayLike) -> float:
    """Return A_last, the A_t after the last task, in percent."""
    return float(np.asarray(curve, dtype=np.float64)[-1])


def forgetting_per_task(matrix: npt.ArrayLike) -> Vector:
    """Return the forgetting of each task but the last (Chaudhry et al. 2018, equation 3).

    ``f_j = max_{l < T-1} R[l, j] - R[T-1, j]`` for ``j = 0 .. T-2``. The maximum is over *earlier* rows only, so
    a task that was improved by later ones has a negative value (code that puts the last row into the maximum,
    as PILOT's does, cannot go below 0).

    Returns:
        float64 [T-1] in percentage points; NaN where no earlier row or not the last row was measured.

    Raises:
        DataError: the matrix is not square or a value is outside 0..100.
    """
    matrix_TT = _square(matrix)
    earlier = np.where(np.isnan(matrix_TT[:-1]), -np.inf, matrix_TT[:-1])
    best = earlier.max(axis=0, initial=-np.inf)[:-1]
    return np.where(np.isneginf(best), np.nan, best - matrix_TT[-1, :-1])


def forgetting(matrix: npt.ArrayLike) -> float:
    """Return the mean forgetting ``F = mean_{j < T-1} f_j``, in percentage points.

    Returns:
        NaN for one task, or where a ``f_j`` is NaN.

    Raises:
        DataError: the matrix is not square or a value is outside 0..100.
    """
    return _mean(forgetting_per_task(matrix))


def backward_transfer(matrix: npt.ArrayLike) -> float:
    """Return BWT (Lopez-Paz and Ranzato 2017): ``mean_{j < T-1} (R[T-1, j] - R[j, j])``.

    Returns:
        Percentage points; negative means forgetting. NaN for one task, or where a needed cell is NaN.

    Raises:
        DataError: the matrix is not square or a value is outside 0..100.
    """
    matrix_TT = _square(matrix)
    return _mean((matrix_TT[-1] - np.diagonal(matrix_TT))[:-1])


def _mean(values: Vector) -> float:
    return float(values.mean()) if values.size else float("nan")


def _square(matrix: npt.ArrayLike) -> Matrix:
    matrix_TT = np.asarray(matrix, dtype=np.float64)
    if matrix_TT.ndim != 2 or matrix_TT.shape[0] != matrix_TT.shape[1] or matrix_TT.size == 0:
        raise DataError(
            f"the accuracy matrix has shape {matrix_TT.shape}, expected [T, T] with one row and column per task"
        )
    # The slack lets a mean of float32 accuracies pass; fractions of 1 cannot be told from small percentages.
    if np.any((matrix_TT < 0) | (matrix_TT > 100 + 1e-6)):
        raise DataError("the accuracy matrix holds values outside 0..100; accuracies are in percent")
    return matrix_TT


def _checked(matrix: npt.ArrayLike, counts: npt.ArrayLike) -> tuple[Matrix, Vector]:
    matrix_TT = _square(matrix)
    counts_T = np.asarray(counts, dtype=np.float64)
    if counts_T.shape != (len(matrix_TT),) or np.any(counts_T < 1):
        raise DataError(
            f"test image counts {counts_T.tolist()} must be {len(matrix_TT)} numbers of at least 1, one for each task"
        )
    return matrix_TT, counts_T
