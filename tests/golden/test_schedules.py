"""Learning rates per epoch: ``lr_e = 0.5 lr0 (1 + cos(pi e / E))``, e = 0 .. E-1 (MOS). Decimals from the formula."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from cl_adapters.model.alignment import cosine_lr
from cl_adapters.strategies.phases import ParamGroup, Phase, all_classes_loss

VALUES = [(10, 0, 1.0), (10, 5, 0.5), (10, 9, 0.0244717), (20, 0, 1.0), (20, 10, 0.5), (20, 19, 0.0061558)]


@pytest.mark.parametrize(("epochs", "epoch", "factor"), VALUES)
def test_cosine(epochs: int, epoch: int, factor: float) -> None:
    assert cosine_lr(0.03, epoch, epochs) == pytest.approx(0.03 * factor, rel=1e-5)


@pytest.mark.parametrize(("epochs", "epoch", "factor"), VALUES)
def test_a_phase_sets_both_groups(epochs: int, epoch: int, factor: float) -> None:
    """Adapters at lr0, the head at a tenth of it, momentum 0.9 and the same weight decay in both."""
    adapter, head = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0, momentum=0.9)
    phase = Phase(
        name="adapter",
        epochs=epochs,
        groups=(
            ParamGroup(params=[adapter], lr=0.03, weight_decay=5e-4),
            ParamGroup(params=[head], lr=0.003, weight_decay=5e-4),
        ),
        loss=all_classes_loss,
    )
    phase.install(optimizer)
    phase.set_epoch(optimizer, epoch)
    groups = optimizer.param_groups
    assert [group["params"] for group in groups] == [[adapter], [head]]
    assert [group["lr"] for group in groups] == pytest.approx([0.03 * factor, 0.003 * factor], rel=1e-5)
    assert [(group["momentum"], group["weight_decay"]) for group in groups] == [(0.9, 5e-4)] * 2


def test_installing_a_phase_keeps_the_optimizer_object_and_drops_old_velocities() -> None:
    parameter = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([parameter], lr=1.0, momentum=0.9)
    parameter.grad = torch.ones(2)
    optimizer.step()
    assert optimizer.state
    groups = optimizer.param_groups
    Phase(name="x", epochs=1, groups=(ParamGroup(params=[parameter], lr=0.5),), loss=all_classes_loss).install(
        optimizer
    )
    assert not optimizer.state
    assert optimizer.param_groups is groups, "schedulers keep their reference"
    before = parameter.detach().clone()
    optimizer.step()
    assert torch.equal(parameter.detach(), before - 0.5), "the first step has no momentum from another phase"
