"""Every adapter type on every family of backbones: felt, mixed, trained; or refused with what there is."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from cl_adapters.adapters import adapters
from cl_adapters.adapters.base import AdapterType, adapter_from
from cl_adapters.backbones.frozen import FrozenBackbone
from cl_adapters.backbones.inputs import take
from cl_adapters.bank.bank import BARE, AdapterBank, Route
from tests.contracts.family_sites import fitting, routed

TYPES = [pytest.param(adapter_from(name), id=name) for name in adapters.names()]
IDS = torch.tensor([2, BARE, 1, 0, 2])


def with_parts(bank: AdapterBank, backbone: FrozenBackbone) -> int:
    """Fill a bank with three random adapters and a fourth at block 1 only; its number."""
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        fresh = bank.fresh(generator, blocks=[1] if seed == 3 else None)
        bank.add_slot({key: 0.5 * torch.randn(value.shape, generator=generator) for key, value in fresh.items()})
    return 3


@pytest.mark.parametrize("adapter", TYPES)
def test_every_type_on_every_family(case: Any, adapter: AdapterType) -> None:
    """Refused before anything else, or felt by the features, in mixed batches as one by one."""
    backbone, x = case.backbone, case.inputs(5)
    plain = backbone.features(x)
    bank = fitting(case, adapter, lambda: AdapterBank(backbone, adapter))
    if bank is None:
        assert torch.equal(backbone.features(x), plain), "no hook was left behind"
        return
    partial = with_parts(bank, backbone)
    for ids in (IDS, torch.tensor([partial, 0, partial, BARE, 2])):
        mixed = routed(bank, backbone, x, Route.hard(ids))
        for i, slot in enumerate(ids.tolist()):
            alone = routed(bank, backbone, take(x, torch.tensor([i])), Route.single(slot))
            assert (mixed[i] - alone[0]).abs().max() < 1e-5 * (1 + alone.abs().max())
            changed = (mixed[i] - plain[i]).abs().max()
            assert changed < 1e-5 if slot == BARE else changed > 1e-4, slot
    weights = torch.rand(5, 4, generator=torch.Generator().manual_seed(0)) * torch.tensor([1, 0, 1, 1])
    soft = routed(bank, backbone, x, Route.soft(weights))
    for i in range(5):
        alone = routed(bank, backbone, take(x, torch.tensor([i])), Route.soft(weights[i : i + 1]))
        assert (soft[i] - alone[0]).abs().max() < 1e-5 * (1 + alone.abs().max())
    assert torch.equal(routed(bank, backbone, x, Route.single(BARE)), plain)
    assert torch.equal(backbone.features(x), plain), "nothing is left behind by a route"


@pytest.mark.parametrize("adapter", TYPES)
def test_every_type_starts_and_trains_on_every_family(case: Any, adapter: AdapterType) -> None:
    """Bit-equal features at the start where the type says so; gradients in every tensor, at every site."""
    backbone, x = case.backbone, case.inputs(4)
    bank = fitting(case, adapter, lambda: AdapterBank(backbone, adapter))
    if bank is None:
        return
    fresh = bank.add_slot(bank.fresh(torch.Generator().manual_seed(0)))
    with torch.no_grad():  # a convolution may take another algorithm where it needs a gradient
        unchanged = torch.equal(routed(bank, backbone, x, Route.single(fresh)), backbone.features(x))
    assert unchanged == adapter.starts_as_identity
    partial = with_parts(bank, backbone)
    for slot in (1, partial + 1):
        routed(bank, backbone, x, Route.single(slot)).square().sum().backward()
        for key, parameter in bank.named_slot(slot):
            assert parameter.grad is not None and parameter.grad.any(), key
    assert all(p.grad is None for p in [*bank.slot_parameters(fresh), *backbone.parameters()])
