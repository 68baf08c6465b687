"""Joint, the upper bound: what its last model depends on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cl_adapters.backbones.frozen import FrozenBackbone
from cl_adapters.config import to_plain
from cl_adapters.strategies import Joint
from cl_adapters.strategies.joint import JointConfig
from tests.avalanche.streams import two_experiences


@pytest.fixture
def backbone(tiny_vit: Callable[..., nn.Module]) -> FrozenBackbone:
    return FrozenBackbone.wrap(tiny_vit(width=16, heads=2, img_size=16, depth=2))


def learned(backbone: FrozenBackbone, first: int, **options: Any) -> dict[str, Tensor]:
    """Adapter and head after two tasks, the first of so many epochs."""
    strategy: Any = Joint(backbone, train_epochs=first, train_mb_size=6, lr=0.1, seed=3, evaluator=None, **options)
    strategy.train(two_experiences()[0])
    strategy.train_epochs = 2
    strategy.train(two_experiences()[1])
    return {**strategy.model.bank.export(0), **strategy.model.head.state_dict()}


def test_restarted_it_depends_on_the_last_training_alone(backbone: FrozenBackbone) -> None:
    one, other = (learned(backbone, first, restart=True) for first in (1, 4))
    assert all(torch.equal(one[key], other[key]) for key in one)
    one, other = (learned(backbone, first) for first in (1, 4))
    assert any(not torch.equal(one[key], other[key]) for key in one), "as before it goes on from the task before"


def test_a_restart_that_fails_leaves_the_model_of_the_task_before(backbone: FrozenBackbone) -> None:
    strategy: Any = Joint(backbone, train_epochs=1, train_mb_size=6, restart=True, evaluator=None)
    first, second = two_experiences()
    strategy.train(first)
    before = {**strategy.model.bank.export(0), **strategy.model.head.state_dict()}
    strategy.before_step = lambda: 1 / 0
    with pytest.raises(ZeroDivisionError):
        strategy.train(second)
    now = {**strategy.model.bank.export(0), **strategy.model.head.state_dict()}
    assert all(torch.equal(now[key], before[key]) for key in before)


def test_its_settings_of_before_stay_as_they_were() -> None:
    assert not JointConfig().restart
    assert "restart" not in to_plain(JointConfig())
