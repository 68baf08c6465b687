"""Merge methods against numbers worked out by hand from the papers, and against PEFT's functions."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from cl_adapters.merge import merges
from cl_adapters.merge.dare import dare
from cl_adapters.merge.magnitude import magnitude
from cl_adapters.merge.task_arithmetic import task_arithmetic
from cl_adapters.merge.ties import ties
from cl_adapters.merge.weighted import weighted


def test_task_arithmetic() -> None:
    """Ilharco et al. 2023: theta_pre + lambda * (tau_1 + tau_2); a negative lambda unlearns."""
    base, tensors = torch.tensor([1.0, 1.0]), [torch.tensor([2.0, 1.0]), torch.tensor([0.0, 4.0])]
    assert task_arithmetic(tensors, base, 0.5).tolist() == [1.0, 2.5]
    assert task_arithmetic(tensors[:1], base, -1.0).tolist() == [0.0, 1.0]
    assert task_arithmetic(tensors).tolist() == pytest.approx([0.8, 2.0])


def test_ties_step_by_step() -> None:
    """Yadav et al. 2023, algorithm 1: at density 0.5 of four numbers two survive, then signs, then the mean of them.

    trimmed [4 0 -3 0], [-1 0 -2 0], [0 5 6 0]; sums 3, 5, 1: all positive; of that sign are 4, 5 and 6.
    """
    tensors = [torch.tensor(row) for row in ([4.0, 1.0, -3.0, 0.1], [-1.0, 0.5, -2.0, 0.2], [0.3, 5.0, 6.0, -0.4])]
    assert ties(tensors, density=0.5).tolist() == [4.0, 5.0, 6.0, 0.0]
    assert ties(tensors, density=1.0).tolist() == pytest.approx([2.15, 6.5 / 3, 6.0, -0.4])
    assert ties(tensors, density=0.5, scale=2.0).tolist() == [8.0, 10.0, 12.0, 0.0]


def test_ties_without_a_majority_changes_nothing() -> None:
    tensors = [torch.tensor([2.0, 1.0]), torch.tensor([-2.0, 1.0])]
    assert ties(tensors, density=1.0).tolist() == [0.0, 1.0]
    assert ties(tensors[::-1], density=1.0).tolist() == [0.0, 1.0]


def test_magnitude_counts_the_zeros() -> None:
    tensors = [torch.tensor([4.0, 1.0]), torch.tensor([2.0, -3.0])]
    assert magnitude(tensors, density=0.5).tolist() == [2.0, -1.5]
    assert magnitude(tensors, density=1.0).tolist() == [3.0, -1.0]
    assert magnitude(tensors, density=0.01).tolist() == [2.0, -1.5], "at least one number is kept"


@pytest.mark.parametrize("drop", [0.2, 0.9])
def test_dare_drops_its_share_and_keeps_the_expectation(drop: float) -> None:
    """Yu et al. 2024: delta = m * delta / (1 - p); 4-sigma bounds of a binomial of 100 000."""
    ones, n = torch.ones(100_000), 100_000
    sparse = dare([ones], drop=drop)
    assert sparse.unique().tolist() == pytest.approx([0.0, 1 / (1 - drop)])
    assert float((sparse == 0).float().mean()) == pytest.approx(drop, abs=4 * math.sqrt(drop * (1 - drop) / n))
    both = dare([ones, ones], drop=0.5, seed=1)
    assert both.unique().tolist() == [0.0, 1.0, 2.0], "each tensor has its own mask"
    assert torch.equal(dare([ones], drop=drop, seed=1), dare([ones], drop=drop, seed=1))
    assert not torch.equal(dare([ones], drop=drop, seed=1), sparse)
    assert dare([torch.tensor([1.0]), torch.tensor([3.0])], drop=0.0).tolist() == [2.0]
    assert dare([torch.tensor([1.0]), torch.tensor([3.0])], drop=0.0, scale=1.0).tolist() == [4.0]


def test_weights_from_metrics() -> None:
    tensors = [torch.tensor([0.0, 1.0]), torch.tensor([1.0, 0.0])]
    assert weighted(tensors).tolist() == [0.5, 0.5]
    assert weighted(tensors, [1.0, 3.0]).tolist() == [0.75, 0.25]
    share = 1 / (1 + math.exp((0.2 - 0.7) / 0.5))
    assert weighted(tensors, [0.2, 0.7], temperature=0.5).tolist() == pytest.approx([share, 1 - share])
    assert weighted(tensors, [-0.7, -0.2], temperature=0.5).tolist() == pytest.approx([share, 1 - share]), "losses"
    assert weighted(tensors, [0.0, 1.0], temperature=1e-3).tolist() == pytest.approx([1.0, 0.0])


@pytest.mark.parametrize(
    ("ours", "theirs", "options"),
    [
        ("ties", "ties", {"density": 0.3}),
        ("magnitude", "magnitude_prune", {"density": 0.3}),
        ("task_arithmetic", "task_arithmetic", {}),
    ],
)
def test_equals_peft_on_matrices(ours: str, theirs: str, options: dict[str, float]) -> None:
    """PEFT's functions are right; what its add_weighted_adapter gives them (A and B apart) is not our question."""
    reference = pytest.importorskip("peft.utils.merge_utils", reason="needs peft: pip install cl-adapters[test]")
    generator = torch.Generator().manual_seed(0)
    tensors: list[Tensor] = [torch.randn(10, 20, generator=generator) for _ in range(3)]
    weights = torch.full((3,), 1 / 3 if ours == "magnitude" else 1.0)
    extra = {"scale": 1.0} if ours == "task_arithmetic" else {}
    found = merges.get(ours)(tensors, **options, **extra)
    assert torch.allclose(found, getattr(reference, theirs)(tensors, weights, **options), atol=1e-6)
