"""LAE: what its released code does around the training loop (main.py:56-64, 208-240; algorithms: Gao et al. 2023).

Wanted values come from NumPy recursions on weights recorded step by step, and from numbers worked out by hand.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from avalanche.core import SupervisedPlugin
from torch import Tensor, nn

from cl_adapters.backbones.frozen import FrozenBackbone
from cl_adapters.model.facade import AdapterModel
from cl_adapters.parts.accumulation import Accumulation
from cl_adapters.strategies.lae import LAE, LAEConfig

Make = Callable[..., LAE]


class Recorder(SupervisedPlugin):
    """Both experts after every step, and epoch by epoch what trains and at which rate."""

    def __init__(self) -> None:
        super().__init__()
        self.experts: list[tuple[dict[str, Tensor], dict[str, Tensor]]] = []
        self.online: list[dict[str, Tensor]] = []
        self.rates: list[list[float]] = []
        self.trains: list[bool] = []
        self.moments: list[tuple[int, int]] = []

    def before_training_epoch(self, strategy: Any, **kwargs: Any) -> None:
        bank = strategy.model.bank
        self.online.append(bank.export(0))
        self.rates.append([group["lr"] for group in strategy.optimizer.param_groups])
        (trains,) = {parameter.requires_grad for parameter in bank.slot_parameters(0)}
        self.trains.append(trains)

    def before_forward(self, strategy: Any, **kwargs: Any) -> None:
        if strategy.model.num_slots > 1:  # after the step before, for the first one the start
            self.experts.append((strategy.model.bank.export(0), strategy.model.bank.export(1)))

    def after_training_epoch(self, strategy: Any, **kwargs: Any) -> None:
        head, (adapter, *_) = strategy.model.head.weight, strategy.model.bank.slot_parameters(0)
        state = strategy.optimizer.state
        self.moments.append(tuple(int(state[p]["step"]) if p in state else 0 for p in (head, adapter)))  # type: ignore[arg-type]

    def after_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        self.before_forward(strategy)


def recorded(strategy: LAE, experience: Any) -> Recorder:
    """Train one experience under a recorder."""
    recorder = Recorder()
    strategy.plugins.append(recorder)
    strategy.train(experience)
    strategy.plugins.remove(recorder)
    return recorder


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Bit for bit."""
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


# --- learning --------------------------------------------------------------------------------------------------------


def test_defaults_are_those_of_the_released_cifar_configuration() -> None:
    config = LAEConfig()
    assert (config.lr, config.train_mb_size, config.train_epochs) == (0.03 * 24 / 256, 24, 5)
    assert (config.decay, config.weight_decay, config.head_lr_factor, config.drop_last) == (0.9999, 0, 1, True)
    assert [config.frozen_in(task) for task in range(3)] == [0, 3, 3]
    assert [LAEConfig(train_epochs=50).frozen_in(task) for task in range(3)] == [0, 30, 30]
    assert LAEConfig(frozen_epochs=5).frozen_in(1) == 5


def test_number_of_parameters_of_the_paper(tiny_vit: Callable[..., nn.Module]) -> None:
    """8,454 numbers in each of the blocks 0-4 of a ViT of width 768."""
    strategy = LAE(model=tiny_vit(width=768, depth=6, heads=12, img_size=16), evaluator=None)
    bank = strategy.model.bank
    assert bank is not None
    assert bank.blocks == (0, 1, 2, 3, 4)
    assert [bank.adapter.num_parameters(site) for site in bank.sites] == [8454] * 5
    assert {(site.source.module.split(".")[-1], site.source.end) for site in bank.sites} == {("norm1", "out")}


def test_epochs_of_a_task(make_lae: Make, three_tasks: list[Any]) -> None:
    """Frozen epochs leave the adapter's bits; the rate is constant; the head's moments go on over the thaw."""
    strategy = make_lae(head_lr_factor=0.5)
    optimizer = strategy.optimizer
    assert isinstance(optimizer, torch.optim.Adam)
    for task, experience in enumerate(three_tasks[:2]):  # the third has one class, which leaves no gradient
        seen = recorded(strategy, experience)
        assert seen.rates == [[0.01, 0.005]] * 5
        assert {(group["betas"], group["weight_decay"]) for group in optimizer.param_groups} == {((0.9, 0.999), 0.0)}
        frozen = 3 if task else 0
        assert seen.trains == [epoch >= frozen for epoch in range(5)]
        assert seen.moments == [(3 * (e + 1), 3 * max(0, e + 1 - frozen)) for e in range(5)]
        after = [*seen.online[1:], strategy.model.bank.export(0)]
        assert [same(a, b) for a, b in zip(seen.online, after, strict=True)] == [epoch < frozen for epoch in range(5)]
        assert any((after[-1][key] != seen.online[0][key]).any() for key in after[-1] if key.endswith("scale"))
    assert strategy.optimizer is optimizer


def test_head_rows_start_small_and_rest_after_their_task(make_lae: Make, three_tasks: list[Any]) -> None:
    """N(0, 0.001) with bias 0; rows of finished tasks keep their bits through Adam steps of later tasks."""
    strategy = make_lae()
    starts: list[tuple[Tensor, Tensor]] = []

    class AtStart(SupervisedPlugin):
        def before_training_exp(self, strategy: Any, **kwargs: Any) -> None:
            head = strategy.model.head
            starts.append((head.weight.detach().clone(), head.bias.detach().clone()))

    strategy.plugins.append(AtStart())
    finished: list[tuple[Tensor, Tensor]] = []
    for experience in three_tasks:
        strategy.train(experience)
        head = strategy.model.head
        for weight, bias in finished:
            assert torch.equal(head.weight[: len(weight)], weight)
            assert torch.equal(head.bias[: len(bias)], bias)
        old = len(finished[-1][0]) if finished else 0
        assert (starts[-1][0][old:] - head.weight[old:]).abs().max() > 1e-3 or len(head.weight) - old == 1
        finished.append((head.weight.detach().clone(), head.bias.detach().clone()))
    rows = torch.cat([weight[known:] for (weight, _), known in zip(starts, (0, 2, 5), strict=True)])
    assert rows.shape == (6, 16)
    assert 0.0007 < float(rows.std()) < 0.0013
    assert not torch.cat([bias[known:] for (_, bias), known in zip(starts, (0, 2, 5), strict=True)]).any()


@pytest.mark.parametrize(("batch", "drop", "steps"), [(5, True, 2), (5, False, 3), (12, True, 1), (50, True, 1)])
def test_incomplete_batches(make_lae: Make, three_tasks: list[Any], batch: int, drop: bool, steps: int) -> None:
    """12 images: an incomplete last batch is left out, but not where it is the only one."""
    strategy = make_lae(train_mb_size=batch, drop_last=drop, train_epochs=1)
    strategy.train(three_tasks[0])
    assert strategy.clock.train_iterations == steps
    strategy.train(three_tasks[1], drop_last=False)
    assert strategy.clock.train_exp_iterations == -(-12 // batch), "what the call says counts"
    cached = make_lae(train_mb_size=batch, drop_last=drop, train_epochs=1, blocks=(2,), cached_views=1)
    cached.train(three_tasks[0])
    assert cached.clock.train_iterations == steps, "batches of cached views too"


# --- accumulation ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("decay", [0.9, 0.9999])
def test_offline_adapter_is_the_moving_average(make_lae: Make, three_tasks: list[Any], decay: float) -> None:
    """Starts as the adapter after task 0; then NumPy's recursion over the online weights, learned scales too."""
    strategy = make_lae(decay=decay)
    strategy.train(three_tasks[0])
    assert strategy.model.num_slots == 1
    average = {key: value.numpy().astype(np.float64) for key, value in strategy.model.bank.export(0).items()}
    steps = 0
    for experience in three_tasks[1:]:
        seen = recorded(strategy, experience)
        for step, (online, offline) in enumerate(seen.experts):
            if step:
                average = {key: decay * old + (1 - decay) * online[key].numpy() for key, old in average.items()}
                steps += 1
            assert all(np.allclose(offline[key], average[key], rtol=0, atol=2e-6) for key in average), step
            if steps <= 9:
                assert same(online, offline), "frozen and equal: the average stays where it is, to the bit"
        moved = max(float((online[key] - offline[key]).abs().max()) for key in online)
        assert moved > 1e-3
    assert steps == 30
    assert any(key.endswith("scale") for key in average)
    part = strategy.model.part("accumulation", Accumulation)
    assert int(part.steps) == steps


def test_weight_of_the_start_after_k_steps(make_lae: Make, three_tasks: list[Any]) -> None:
    """The online adapter at 1, its start at 0: after k steps the average is 1 - decay^k."""
    strategy = make_lae(decay=0.99, frozen_epochs=5)
    strategy.train(three_tasks[0])
    bank = strategy.model.bank
    assert bank is not None

    class Jump(SupervisedPlugin):
        def before_training_exp(self, strategy: Any, **kwargs: Any) -> None:
            with torch.no_grad():
                for online, offline in zip(bank.slot_parameters(0), bank.slot_parameters(1), strict=True):
                    online.fill_(1)
                    offline.fill_(0)

    strategy.plugins.append(Jump())
    strategy.train(three_tasks[1])
    for value in bank.export(1).values():
        assert torch.allclose(value, torch.full_like(value, 1 - 0.99**15), atol=1e-6)
    assert all(bool((value == 1).all()) for value in bank.export(0).values())


def test_steps_and_average_go_on_after_loading(make_lae: Make, three_tasks: list[Any], tmp_path: Path) -> None:
    """Saved after task 1 (15 steps), loaded, gone on: the bits of an uninterrupted run."""
    strategy = make_lae()
    for experience in three_tasks[:2]:
        strategy.train(experience)
    path = strategy.model.save(tmp_path / "model")
    loaded = AdapterModel.load(path, FrozenBackbone.wrap(copy.deepcopy(strategy.model.backbone.encoder)))
    steps = loaded.part("accumulation", Accumulation).steps
    assert steps.dtype == torch.int64
    assert int(steps) == 15
    again = make_lae(model=loaded)
    for each in (strategy, again):
        each.train(three_tasks[2])
        assert int(each.model.part("accumulation", Accumulation).steps) == 30
    for slot in (0, 1):
        assert same(strategy.model.bank.export(slot), again.model.bank.export(slot))
    x = torch.randn(7, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    assert torch.equal(strategy.model.predict(x), again.model.predict(x))
