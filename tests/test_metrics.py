"""Metrics against numbers worked out by hand."""

import numpy as np
import pytest

from cl_adapters import metrics
from cl_adapters.errors import DataError

NAN = float("nan")
# Three tasks. By hand, with counts (10, 30, 60):
#   A_0 = 90;  A_1 = (10*80 + 30*60)/40 = 2600/40 = 65;  A_2 = (10*85 + 30*40 + 60*70)/100 = 6250/100 = 62.5
MATRIX = [[90.0, NAN, NAN], [80.0, 60.0, NAN], [85.0, 40.0, 70.0]]
COUNTS = [10, 30, 60]


def test_curve_weighs_every_image_alike() -> None:
    curve = metrics.average_curve(MATRIX, COUNTS)
    assert curve.tolist() == [90.0, 65.0, 62.5]
    assert metrics.average_accuracy(curve) == pytest.approx((90 + 65 + 62.5) / 3)
    assert metrics.last_accuracy(curve) == 62.5


def test_forgetting_and_backward_transfer() -> None:
    # f_0 = max(90, 80) - 85 = 5; f_1 = 60 - 40 = 20. BWT = ((85-90) + (40-60)) / 2 = -12.5
    assert metrics.forgetting_per_task(MATRIX).tolist() == [5.0, 20.0]
    assert metrics.forgetting(MATRIX) == 12.5
    assert metrics.backward_transfer(MATRIX) == -12.5


def test_forgetting_takes_the_best_row_where_backward_transfer_takes_the_first() -> None:
    matrix = [[50.0, NAN, NAN], [80.0, 60.0, NAN], [70.0, 65.0, 9.0]]
    assert metrics.forgetting_per_task(matrix).tolist() == [10.0, -5.0]
    assert metrics.backward_transfer(matrix) == 12.5


def test_unseen_cells_do_not_enter_the_curve() -> None:
    zero_shot = [[90.0, 30.0, 1.0], [80.0, 60.0, 20.0], [85.0, 40.0, 70.0]]
    assert metrics.average_curve(zero_shot, COUNTS).tolist() == [90.0, 65.0, 62.5]


def test_one_task() -> None:
    curve = metrics.average_curve([[42.0]], [7])
    assert curve.tolist() == [42.0]
    assert metrics.forgetting_per_task([[42.0]]).shape == (0,)
    assert np.isnan(metrics.forgetting([[42.0]]))
    assert np.isnan(metrics.backward_transfer([[42.0]]))


def test_rows_that_were_not_evaluated_give_nan_not_a_flattering_mean() -> None:
    only_last = [[NAN, NAN], [70.0, 50.0]]
    curve = metrics.average_curve(only_last, [1, 1])
    assert np.isnan(curve[0]) and curve[1] == 60.0
    assert np.isnan(metrics.average_accuracy(curve))
    assert metrics.last_accuracy(curve) == 60.0
    assert np.isnan(metrics.forgetting(only_last))


@pytest.mark.parametrize(
    ("matrix", "counts", "message"),
    [
        ([[1.0, 2.0]], [1], "shape"),
        ([[101.0]], [1], "0..100"),
        ([[-1.0]], [1], "0..100"),
        ([[50.0]], [0], "at least 1"),
        ([[50.0]], [1, 2], "1 numbers"),
    ],
)
def test_bad_input_is_named(matrix: list[list[float]], counts: list[int], message: str) -> None:
    with pytest.raises(DataError, match=message):
        metrics.average_curve(matrix, counts)
