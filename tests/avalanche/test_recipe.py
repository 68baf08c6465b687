"""A user's own optimizer, schedule and criterion in every strategy that trains."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from avalanche.training.losses import MaskedCrossEntropy
from avalanche.training.plugins import LRSchedulerPlugin, SupervisedPlugin
from torch import nn
from torch.optim import SGD, Adam, AdamW
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, LinearLR, OneCycleLR, ReduceLROnPlateau, StepLR

from cl_adapters.backbones.frozen import FrozenBackbone
from cl_adapters.errors import ConfigError
from cl_adapters.strategies import LAE, MOS, RanPAC, SimpleCIL
from cl_adapters.strategies.base import AdapterStrategy, strategies
from tests.avalanche.streams import two_experiences

TRAINED = [name for name in strategies.names() if name != "simple_cil"]
Vit = Callable[[], nn.Module]


@pytest.fixture
def vit(tiny_vit: Callable[..., nn.Module]) -> Vit:
    return lambda: tiny_vit(width=16, heads=2, img_size=16, depth=2)


def small(cls: type[AdapterStrategy], model: nn.Module, **options: Any) -> AdapterStrategy:
    """Two epochs in batches of six."""
    return cls(model=model, evaluator=None, **{"train_mb_size": 6, "train_epochs": 2, **options})


class Seen(SupervisedPlugin[Any]):
    """The optimizer's class and the learning rate of its first group at every step, by experience."""

    def __init__(self) -> None:
        super().__init__()
        self.rates: list[list[float]] = []
        self.kinds: set[type] = set()
        self.settings: dict[str, Any] = {}

    def before_training_exp(self, strategy: Any, **_: Any) -> None:
        self.rates.append([])

    def after_update(self, strategy: Any, **_: Any) -> None:
        group = strategy.optimizer.param_groups[0]
        self.rates[-1].append(round(float(group["lr"]), 6))
        self.kinds.add(type(strategy.optimizer))
        self.settings = {key: value for key, value in group.items() if key != "params"}


@pytest.mark.parametrize("name", TRAINED)
@pytest.mark.parametrize("given", ["class", "function", "object"])
def test_an_own_optimizer_trains_every_phase(name: str, given: str, vit: Vit) -> None:
    model = vit()
    optimizer: Any = {
        "class": AdamW,
        "function": partial(AdamW, lr=0.002, weight_decay=0.3, betas=(0.8, 0.9)),
        "object": AdamW(model.parameters(), lr=0.002, weight_decay=0.3, betas=(0.8, 0.9)),
    }[given]
    seen = Seen()
    strategy = small(strategies.get(name), model, optimizer=optimizer, plugins=[seen])
    before = copy.deepcopy(model.state_dict())
    strategy.train(two_experiences()[0])
    assert seen.kinds == {AdamW}
    assert max(seen.rates[0]) == (0.001 if given == "class" else 0.002)
    if given != "class":
        assert seen.settings["betas"] == (0.8, 0.9)
        assert seen.settings["weight_decay"] == 0.3
    now = model.state_dict()
    assert all(torch.equal(value, now[key]) for key, value in before.items()), "the backbone's weights are the method's"


def test_without_one_nothing_is_another_recipe(vit: Vit) -> None:
    seen = Seen()
    small(LAE, vit(), plugins=[seen]).train(two_experiences()[0])
    assert seen.kinds == {Adam}
    seen = Seen()
    small(MOS, vit(), plugins=[seen]).train(two_experiences()[0])
    assert seen.kinds == {SGD}


@pytest.mark.parametrize("name", TRAINED)
def test_a_schedule_of_a_plugin_acts_within_every_phase(name: str, vit: Vit) -> None:
    """By epoch; two epochs of two steps, whose first phase comes again in the next experience."""
    optimizer, seen = SGD([nn.Parameter(torch.zeros(1))], lr=0.08), Seen()
    plugins = [LRSchedulerPlugin(StepLR(optimizer, 1, gamma=0.5)), seen]
    strategy = small(strategies.get(name), vit(), optimizer=optimizer, plugins=plugins)
    for experience in two_experiences():
        strategy.train(experience)
    assert seen.rates[0][:4] == [0.08, 0.08, 0.04, 0.04]
    if seen.rates[1]:
        factor = seen.rates[1][0] / 0.08  # where only the head is trained it has its own rate
        steps = 4 if name == "joint" else 2  # on everything so far
        assert seen.rates[1][: 2 * steps] == [round(factor * rate, 6) for rate in (*[0.08] * steps, *[0.04] * steps)]


@pytest.mark.parametrize(
    ("make", "wanted"),
    [
        (lambda o: OneCycleLR(o, 0.1, total_steps=4, pct_start=0.5, anneal_strategy="linear"), [0.004, 0.1, 0.05, 0.0]),
        (lambda o: LambdaLR(o, lambda step: 1 / (1 + step)), [0.08, 0.04, 0.026667, 0.02]),
        (lambda o: LinearLR(o, start_factor=0.25, total_iters=3), [0.02, 0.04, 0.06, 0.08]),
    ],
    ids=["one cycle", "lambda", "warm-up"],
)
def test_a_schedule_of_a_plugin_by_iteration(make: Callable[[Any], Any], wanted: list[float], vit: Vit) -> None:
    optimizer, seen = SGD([nn.Parameter(torch.zeros(1))], lr=0.08, momentum=0.9), Seen()
    plugins = [LRSchedulerPlugin(make(optimizer), step_granularity="iteration"), seen]
    strategy = small(MOS, vit(), optimizer=optimizer, plugins=plugins)
    for experience in two_experiences():
        strategy.train(experience)
    for rates in seen.rates:
        assert rates == pytest.approx(wanted, abs=1e-6)


def test_a_schedule_that_follows_the_loss(vit: Vit) -> None:
    optimizer, seen = SGD([nn.Parameter(torch.zeros(1))], lr=0.08), Seen()
    schedule = ReduceLROnPlateau(optimizer, patience=0, threshold=1e9, threshold_mode="abs", factor=0.5)
    plugins = [LRSchedulerPlugin(schedule, metric="train_loss"), seen]
    small(MOS, vit(), optimizer=optimizer, plugins=plugins, train_epochs=3).train(two_experiences()[0])
    assert seen.rates[0] == [0.08, 0.08, 0.08, 0.08, 0.04, 0.04]


@pytest.mark.parametrize("name", TRAINED)
def test_a_scheduler_takes_the_place_of_the_methods(name: str, vit: Vit) -> None:
    seen = Seen()
    scheduler = partial(CosineAnnealingLR, T_max=2)
    small(strategies.get(name), vit(), lr=0.01, scheduler=scheduler, plugins=[seen]).train(two_experiences()[0])
    assert seen.rates[0][:4] == [0.01, 0.01, 0.005, 0.005]


@pytest.mark.parametrize("name", TRAINED)
def test_an_own_criterion(name: str, vit: Vit) -> None:
    calls: list[tuple[int, ...]] = []

    class Smooth(nn.CrossEntropyLoss):
        def forward(self, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
            calls.append(tuple(logits.shape))
            return super().forward(logits, target)

    plain = small(strategies.get(name), vit())
    smooth = small(strategies.get(name), vit(), criterion=Smooth(label_smoothing=0.3))
    for strategy in (plain, smooth):
        strategy.train(two_experiences()[0])
    assert (6, 2) in calls
    one, other = (strategy.model.bank.export(0) for strategy in (plain, smooth))
    assert any(not torch.equal(one[key], other[key]) for key in one)


def test_epochs_may_be_set_later(vit: Vit) -> None:
    strategy: Any = small(MOS, vit())
    seen = Seen()
    strategy.plugins.append(seen)
    strategy.train_epochs = 3
    strategy.train(two_experiences()[0])
    assert len(seen.rates[0]) == 6
    assert strategy.config.train_epochs == strategy.train_epochs == 3
    with pytest.raises(ConfigError, match="train_epochs"):
        strategy.train_epochs = 0
    with pytest.raises(ConfigError, match="SimpleCIL trains nothing, so train_epochs has no effect"):
        SimpleCIL(model=vit()).train_epochs = 5


@pytest.mark.parametrize("name", TRAINED)
def test_by_position_as_in_avalanche(name: str, vit: Vit) -> None:
    criterion = nn.CrossEntropyLoss(label_smoothing=0.1)
    strategy: Any = strategies.get(name)(vit(), partial(SGD, lr=0.05), criterion, train_epochs=1)
    assert strategy.config.lr == 0.05
    assert strategy._criterion is criterion


class TwoGroups(SGD):
    """As a fine-tuner makes them."""

    def __init__(self) -> None:
        super().__init__([{"params": [nn.Parameter(torch.zeros(1))]}, {"params": [nn.Parameter(torch.zeros(1))]}], lr=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"optimizer": partial(SGD, lr=0.1), "lr": 0.2}, "lr is a setting of the optimizer that was given"),
        ({"optimizer": TwoGroups()}, "TwoGroups has 2 groups of parameters"),
        ({"optimizer": torch.optim.LBFGS}, "LBFGS wants a closure"),
        ({"optimizer": lambda parameters: None}, "optimizer has to be an optimizer, or a function that makes one"),
        ({"optimizer": partial(SGD, lr=0.0)}, "lr must be positive"),
        ({"criterion": 3}, "criterion has to be callable"),
        ({"criterion": nn.CrossEntropyLoss(weight=torch.ones(4))}, "CrossEntropyLoss has weights of classes"),
        ({"criterion": nn.CrossEntropyLoss(reduction="none")}, "gives no scalar"),
        ({"criterion": MaskedCrossEntropy()}, "MaskedCrossEntropy masks classes by itself"),
        ({"criterion": lambda logits: logits.sum()}, "logits and the right columns"),
        ({"scheduler": ReduceLROnPlateau}, "ReduceLROnPlateau follows a metric"),
        ({"scheduler": lambda optimizer: 3}, "scheduler has to make a schedule from an optimizer, got 3"),
        (
            {"plugins": [LRSchedulerPlugin(StepLR(SGD([nn.Parameter(torch.zeros(1))], lr=1), 1))]},
            "the StepLR of LRSchedulerPlugin belongs to another optimizer: pass that one as optimizer= too",
        ),
    ],
)
def test_what_cannot_be_used_is_refused_by_name(options: dict[str, Any], message: str, vit: Vit) -> None:
    with pytest.raises(ConfigError, match=message):
        MOS(model=vit(), **options)


@pytest.mark.parametrize("option", ["optimizer", "criterion", "scheduler"])
def test_what_has_no_effect_is_refused(option: str, vit: Vit) -> None:
    value: dict[str, Any] = {"optimizer": SGD, "criterion": nn.CrossEntropyLoss(), "scheduler": LinearLR}
    for make in (partial(SimpleCIL, model=vit()), partial(RanPAC, model=vit(), train_adapter=False)):
        with pytest.raises(ConfigError, match=f"trains nothing here, so {option}= has no effect"):
            make(**{option: value[option]})


def test_a_frozen_backbone_is_shared_by_optimizers(vit: Vit) -> None:
    backbone = FrozenBackbone.wrap(vit())
    before = copy.deepcopy(backbone.encoder.state_dict())
    for cls in (MOS, LAE):
        strategy = small(cls, backbone, optimizer=AdamW)
        strategy.train(two_experiences()[0])
        assert strategy.model.classes == [0, 1]
    assert all(torch.equal(value, before[key]) for key, value in backbone.encoder.state_dict().items())
