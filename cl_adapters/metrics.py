"""Figures of continual learning, computed from one accuracy matrix (NumPy only).

``R`` [T, T] is the accuracy matrix: ``R[t, j]`` is the accuracy, in percent, on the test images of task ``j``
after training on task ``t``; both count from 0 and NaN stands for "not measured". ``n`` [T] is the number of
test images per task. In class-incremental learning the cells above the diagonal are NaN.

Sources:
    Lopez-Paz and Ranzato, "Gradient Episodic Memory for Continual Learning", NeurIPS 2017: ``R``, BWT, FWT.
    Chaudhry et al., "Riemannian Walk for Incremental Learning", ECCV 2018: forgetting.

A figure that cannot be had from the measured cells is NaN; nothing is averaged over what happens to be there.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from cl_adapters.errors import DataError

Matrix = npt.NDArray[np.float64]
Vector = npt.NDArray[np.float64]


def accuracy_row(
    labels: npt.ArrayLike, predictions: npt.ArrayLike, tasks: Sequence[Sequence[int]], num_tasks: int
) -> Vector:
    """Return one row of ``R`` from the answers to one evaluation.

    ``row[j] = 100 * (right answers among images of task j) / (images of task j)``.

    Args:
        labels: right class of each image, int64 [N].
        predictions: predicted class of each image, int64 [N].
        tasks: class labels of each task, in order of arrival; may cover fewer tasks than ``num_tasks``.
        num_tasks: T, the length of the row.

    Returns:
        float64 [T] in percent; NaN for tasks without an image here.

    Raises:
        DataError: lengths differ, or ``tasks`` has more than ``num_tasks`` entries.
    """
    labels_N, predictions_N = np.asarray(labels), np.asarray(predictions)
    if labels_N.shape != predictions_N.shape or labels_N.ndim != 1:
        raise DataError(
            f"labels {labels_N.shape} and predictions {predictions_N.shape} must be one row of equal length"
        )
    if len(tasks) > num_tasks:
        raise DataError(f"{len(tasks)} tasks do not fit a row of {num_tasks}")
    right_N = labels_N == predictions_N
    row_T = np.full(num_tasks, np.nan)
    for task, classes in enumerate(tasks):
        here_N = np.isin(labels_N, np.asarray(classes, dtype=np.int64))
        if here_N.any():
            row_T[task] = 100.0 * float(right_N[here_N].mean())
    return row_T


def average_curve(matrix: npt.ArrayLike, counts: npt.ArrayLike) -> Vector:
    """Return the curve A_t: accuracy over the test images of all classes seen after task t.

    ``A_t = sum_{j<=t} n_j R[t, j] / sum_{j<=t} n_j``: every image weighs the same, so unequal tasks do not
    distort it. It equals top-1 accuracy on the joint test set of the seen classes.

    Args:
        matrix: R [T, T], percent.
        counts: n [T], test images per task.

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
    """Return A-bar, ``mean_t A_t`` ("average incremental accuracy"), in percent; NaN if one A_t is NaN.

    Args:
        curve: A_t [T], percent.
    """
    return float(np.mean(np.asarray(curve, dtype=np.float64)))


def last_accuracy(curve: npt.ArrayLike) -> float:
    """Return A_last, the A_t after the last task, in percent.

    Args:
        curve: A_t [T], percent.
    """
    return float(np.asarray(curve, dtype=np.float64)[-1])


def forgetting_per_task(matrix: npt.ArrayLike) -> Vector:
    """Return the forgetting of each task but the last (Chaudhry et al. 2018, equation 3).

    ``f_j = max_{l < T-1} R[l, j] - R[T-1, j]`` for ``j = 0 .. T-2``. The maximum is over *earlier* rows only, so
    a task that was improved by later ones has a negative value (code that puts the last row into the maximum,
    as PILOT's does, cannot go below 0).

    Args:
        matrix: R [T, T], percent.

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

    Args:
        matrix: R [T, T], percent.

    Returns:
        NaN for one task, or where a ``f_j`` is NaN.

    Raises:
        DataError: the matrix is not square or a value is outside 0..100.
    """
    return _mean(forgetting_per_task(matrix))


def backward_transfer(matrix: npt.ArrayLike) -> float:
    """Return BWT (Lopez-Paz and Ranzato 2017): ``mean_{j < T-1} (R[T-1, j] - R[j, j])``.

    Args:
        matrix: R [T, T], percent.

    Returns:
        Percentage points; negative means forgetting. NaN for one task, or where a needed cell is NaN.

    Raises:
        DataError: the matrix is not square or a value is outside 0..100.
    """
    matrix_TT = _square(matrix)
    return _mean((matrix_TT[-1] - np.diagonal(matrix_TT))[:-1])


def forward_transfer(matrix: npt.ArrayLike, baseline: npt.ArrayLike) -> float:
    """Return FWT (Lopez-Paz and Ranzato 2017): ``mean_{j >= 1} (R[j-1, j] - b_j)``.

    It is defined only where a model can answer for classes before it has seen them (shared heads, text
    encoders): class-incremental runs leave ``R[j-1, j]`` unmeasured, and the result is NaN.

    Args:
        matrix: R [T, T], percent, with the diagonal above the main one measured.
        baseline: b [T], accuracy of an untrained model on each task, percent; ``b_0`` is not used.

    Returns:
        Percentage points. NaN for one task, or where a needed cell is NaN.

    Raises:
        DataError: the matrix is not square, a value is outside 0..100, or the lengths differ.
    """
    matrix_TT = _square(matrix)
    baseline_T = np.asarray(baseline, dtype=np.float64)
    if baseline_T.shape != (len(matrix_TT),):
        raise DataError(
            f"the baseline has shape {baseline_T.shape}, expected one accuracy for each of {len(matrix_TT)} tasks"
        )
    return _mean(np.diagonal(matrix_TT, offset=1) - baseline_T[1:])


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
