"""Factors of MOS's adapter merging, and its anchor.

Origin: ``w <- (1 - m) w + m mu`` with m = 0.1 (MOS); the released code does it once per layer in every forward pass
(vit_mos.py:360-377) and once after the optimizer's step. The decimals were measured on the released code.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cl_adapters.merge.ema import ema
from cl_adapters.merge.mean import mean

ONE, ZERO = torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)


def repeated(w: Tensor, anchor: Tensor, times: int) -> Tensor:
    for _ in range(times):
        w = 0.9 * w + 0.1 * anchor
    return w


@pytest.mark.parametrize(("steps", "factor"), [(1, 0.9), (12, 0.2824295), (13, 0.2541866)])
def test_factor_after_a_number_of_merges(steps: int, factor: float) -> None:
    """w = 1, mu = 0: after one merge, after one forward of 12 layers, after one whole training step."""
    assert ema([ONE, ZERO], 0.1, steps).item() == pytest.approx(factor, abs=5e-8)


@pytest.mark.parametrize("layer", range(12))
def test_layer_l_of_a_forward_computes_with_l_plus_one_merges(layer: int) -> None:
    """0.9^(l + 1), and the closed form is the repeated one for a deviation of any size."""
    assert ema([ONE, ZERO], 0.1, layer + 1).item() == pytest.approx(0.9 ** (layer + 1), rel=1e-12)
    w, anchor = torch.randn(2, 7, generator=torch.Generator().manual_seed(layer), dtype=torch.float64)
    assert torch.allclose(ema([w, anchor], 0.1, layer + 1), repeated(w, anchor, layer + 1), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(("forwards", "left"), [(1, 0.28243), (2, 0.07977), (3, 0.02253), (4, 0.00636)])
def test_closed_form_of_the_released_evaluation(forwards: int, left: float) -> None:
    """What is left of A_t - mu_t after evaluation forwards of the released code, which writes to the stored adapter."""
    assert ema([ONE, ZERO], 0.1, 12 * forwards).item() == pytest.approx(left, abs=5e-6)


def test_merging_writes_nothing() -> None:
    w, anchor = torch.randn(2, 3)
    before = w.clone(), anchor.clone()
    merged = ema([w, anchor], 0.1, 3)
    assert torch.equal(w, before[0])
    assert torch.equal(anchor, before[1])
    assert merged.data_ptr() not in (w.data_ptr(), anchor.data_ptr())


def test_anchor_is_the_mean_of_the_finished_adapters() -> None:
    """Adapters 1, 3, 8: mu_1 = 1, mu_2 = 2, mu_3 = 4."""
    finished = [torch.tensor([value]) for value in (1.0, 3.0, 8.0)]
    assert [mean(finished[:t]).item() for t in (1, 2, 3)] == [1.0, 2.0, 4.0]
