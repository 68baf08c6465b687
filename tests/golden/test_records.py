"""Records of SEMA's errors, step by step on numbers that can be checked by hand.

Origin: SEMA, released code sema_components.py (records) and sema_block.py:274-290 (z-scores): a buffer that fills,
then slides; mean and unbiased standard deviation of the filled part; z = |e - mean| / std, 0 while 2 or fewer entries.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from cl_adapters.errors import ClAdaptersError
from cl_adapters.parts.descriptors import Descriptors, Records


def errors(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float32)


def test_fills_drops_the_surplus_of_the_batch_that_overfills_then_slides() -> None:
    """Buffer 5: add 3, then 4 of which 2 are kept, then 2 that push the oldest out."""
    records = Records(5)
    records.add(errors(1, 2, 4))
    assert records.values.tolist() == [1, 2, 4]
    assert float(records.mean) == pytest.approx(7 / 3)
    assert float(records.std) == pytest.approx(math.sqrt(7 / 3))  # unbiased; the biased one is sqrt(14 / 9)
    records.add(errors(8, 16, 32, 64))
    assert records.values.tolist() == [1, 2, 4, 8, 16]
    assert float(records.mean) == pytest.approx(6.2)
    assert float(records.std) == pytest.approx(6.0991803)  # sqrt(148.8 / 4)
    records.add(errors(3, 5))
    assert records.values.tolist() == [4, 8, 16, 3, 5]
    assert float(records.mean) == pytest.approx(7.2)
    assert float(records.std) == pytest.approx(5.2630789)  # sqrt(110.8 / 4)
    assert len(records) == 5


def test_a_batch_larger_than_the_buffer() -> None:
    """The first errors while it fills, the last ones when it slides; also when a batch fills it exactly."""
    records = Records(3)
    records.add(errors(1, 2, 3, 4, 5))
    assert records.values.tolist() == [1, 2, 3]
    records.add(errors(6, 7, 8, 9))
    assert records.values.tolist() == [7, 8, 9]
    exact = Records(3)
    exact.add(errors(1))
    exact.add(errors(2, 3))
    exact.add(errors(4))
    assert exact.values.tolist() == [2, 3, 4]


def test_no_scores_while_two_or_fewer_are_known() -> None:
    records = Records(5)
    for known in ((), (1.0,), (2.0,)):
        records.add(errors(*known))
        assert records.z(errors(0, 1, 100)).tolist() == [0, 0, 0]
    assert len(records) == 2
    records.add(errors(3))
    assert records.z(errors(2, 5)).tolist() == [0, 3]


def test_an_unusually_low_error_counts_as_well() -> None:
    """The absolute value: 2 standard deviations below the mean are as new as 2 above."""
    records = Records(5)
    records.add(errors(4, 5, 6))
    assert records.z(errors(3, 4.5, 5, 7)).tolist() == [2, 0.5, 0, 2]


def test_errors_that_are_all_the_same() -> None:
    """No spread: the same error, but for rounding, is nothing new, every other is; never a NaN."""
    records = Records(5)
    records.add(errors(0.1, 0.1, 0.1, 0.1))
    same, rounded, other = records.z(errors(0.1, 0.1 * (1 + 1e-7), 0.11)).tolist()
    assert max(same, rounded) < 0.5
    assert other > 1000
    zero = Records(5)
    zero.add(errors(0, 0, 0))
    assert zero.z(errors(0, 1e-9)).tolist() == [0, math.inf]


def test_looking_changes_nothing_and_what_is_kept_is_a_copy() -> None:
    records, batch = Records(4), errors(1, 2, 3).requires_grad_()
    records.add(batch)
    records.z(errors(9, 9))
    with torch.no_grad():
        batch.fill_(0)
    assert records.values.tolist() == [1, 2, 3]
    assert not records.values.requires_grad


def test_room_for_fewer_than_three_never_gives_a_score() -> None:
    with pytest.raises(ClAdaptersError, match="room for 3 errors or more to give z-scores, got 2"):
        Records(2)


def scripted(*records: tuple[float, ...]) -> Descriptors:
    """Descriptors of inputs [B, 2] that answer 0 (so that e = mean p^2), with these records."""
    descriptors = Descriptors({7: 2}, dim=1, buffer=5)
    for slot, values in enumerate(records):
        for parameter in descriptors.grow(7, slot, torch.Generator()):
            parameter.data.zero_()
        descriptors.descriptor(7, slot).records.add(errors(*values))
    return descriptors


def test_a_batch_is_as_new_as_the_nearest_descriptor_says() -> None:
    """The smallest of the descriptors' batch means, not the mean of the images' smallest."""
    descriptors = scripted((1, 2, 3), (7, 9, 11))
    p_BD = errors(3, 9).sqrt()[:, None].repeat(1, 2)  # errors 3 and 9
    z_KB = descriptors.z(7, p_BD)
    assert z_KB.numpy() == pytest.approx(torch.tensor([[1.0, 7.0], [3.0, 0.0]]).numpy(), abs=1e-5)
    assert descriptors.score(7, p_BD) == pytest.approx(1.5, abs=1e-5)
    assert not z_KB.requires_grad
    with pytest.raises(ClAdaptersError, match="block 7 has no descriptor yet"):
        scripted().score(7, p_BD)
