"""Replay in every strategy that trains, and what plugins cannot do."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from avalanche.training.plugins import (
    EarlyStoppingPlugin,
    ReplayPlugin,
    SupervisedPlugin,
)
from torch import nn

from cl_adapters.strategies import RanPAC, SimpleCIL
from cl_adapters.strategies.base import strategies
from cl_adapters.strategies.phases import Batch, current_task_loss
from tests.avalanche.streams import two_experiences

TRAINED = [name for name in strategies.names() if name != "simple_cil"]
Vit = Callable[[], nn.Module]


@pytest.fixture
def vit(tiny_vit: Callable[..., nn.Module]) -> Vit:
    return lambda: tiny_vit(width=16, heads=2, img_size=16, depth=2)


class Labels(SupervisedPlugin[Any]):
    """The labels of every training batch, by experience."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[set[int]] = []

    def before_training_exp(self, strategy: Any, **_: Any) -> None:
        self.seen.append(set())

    def before_forward(self, strategy: Any, **_: Any) -> None:
        self.seen[-1] |= set(strategy.mb_y.tolist())


@pytest.mark.parametrize("name", TRAINED)
def test_replay_brings_old_classes_into_training(name: str, vit: Vit) -> None:
    labels = Labels()
    plugins = [ReplayPlugin(mem_size=6), labels]
    strategy: Any = strategies.get(name)(
        vit(), train_mb_size=6, train_epochs=2, lr=0.05, evaluator=None, plugins=plugins, seed=0
    )
    stream = two_experiences()
    for experience in stream:
        strategy.train(experience)
    assert labels.seen[0] == {0, 1}
    if labels.seen[1]:  # others train in their first task only
        assert labels.seen[1] == {0, 1, 2, 3}
    x = torch.stack([stream[0].dataset[place][0] for place in range(4)])
    assert strategy.model.predict(x).isfinite().all()
    assert strategy.model.classes == [0, 1, 2, 3]


def test_old_samples_are_judged_over_all_columns_new_ones_over_their_own() -> None:
    logits = torch.randn(5, 4, generator=torch.Generator().manual_seed(0), requires_grad=True)
    columns = torch.tensor([2, 0, 3, 1, 2])
    loss = current_task_loss(Batch(torch.zeros(5, 1), logits, columns), known=2)
    new, old = [0, 2, 4], [1, 3]
    each = [F.cross_entropy(logits[row : row + 1, 2:], columns[row : row + 1] - 2) for row in new]
    each += [F.cross_entropy(logits[row : row + 1], columns[row : row + 1]) for row in old]
    assert torch.allclose(loss, torch.stack(each).mean())
    (gradient,) = torch.autograd.grad(loss, logits)
    assert (gradient[new, :2] == 0).all()
    assert (gradient[old] != 0).all()
    only_old = current_task_loss(Batch(torch.zeros(2, 1), logits[old], columns[old]), known=2)
    assert torch.equal(only_old, F.cross_entropy(logits[old], columns[old]))


@pytest.mark.parametrize("plugin", [ReplayPlugin(), EarlyStoppingPlugin(1, "train_stream"), Labels()])
def test_a_plugin_without_effect_is_named(plugin: Any, vit: Vit) -> None:
    name = type(plugin).__name__
    for make in (SimpleCIL, lambda model, **options: RanPAC(model, train_adapter=False, **options)):
        with pytest.warns(UserWarning, match=f"trains nothing here, so {name} has no effect in training"):
            make(vit(), plugins=[plugin])


def test_replay_where_only_the_first_task_is_trained(vit: Vit) -> None:
    with pytest.warns(UserWarning, match="RanPAC trains in the first task only, so ReplayPlugin has no effect"):
        RanPAC(vit(), plugins=[ReplayPlugin()])


def test_a_plugin_that_only_looks_on_is_not(vit: Vit) -> None:
    class After(SupervisedPlugin[Any]):
        def after_training_exp(self, strategy: Any, **_: Any) -> None:
            """Save something."""

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        strategy = SimpleCIL(vit(), plugins=[After()], evaluator=None)
    assert any(isinstance(plugin, After) for plugin in strategy.plugins)
