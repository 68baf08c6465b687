"""Class orders of seed 1993, as the released logs of MOS print them."""

from __future__ import annotations

from cl_adapters.benchmarks.base import arrival_order


def test_cifar100() -> None:
    order = arrival_order(100, 1993)
    assert order[:10] == (68, 56, 78, 8, 23, 84, 90, 65, 74, 76)
    assert sorted(order) == list(range(100))


def test_omnibenchmark() -> None:
    order = arrival_order(300, 1993)
    assert order[:10] == (169, 221, 146, 296, 92, 229, 49, 70, 126, 77)
    assert sorted(order) == list(range(300))


def test_vtab_is_not_shuffled() -> None:
    assert arrival_order(50, None) == tuple(range(50))
