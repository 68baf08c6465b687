"""Optimizer, schedule, warm-up, smoothing and clipping as settings of every strategy that trains."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import pytest
import torch
from avalanche.training.plugins import LRSchedulerPlugin, SupervisedPlugin
from torch import nn
from torch.optim import SGD, Adam, AdamW
from torch.optim.lr_scheduler import LinearLR, StepLR

from cl_adapters.benchmarks.run.experiment import resolve
from cl_adapters.config import build, to_plain
from cl_adapters.errors import ConfigError
from cl_adapters.strategies import LAE, MOS, Sequential, SimpleCIL
from cl_adapters.strategies.base import AdapterStrategy, strategies
from cl_adapters.strategies.config import TrainingConfig
from cl_adapters.strategies.lae import LAEConfig
from cl_adapters.strategies.phases import Phase, all_classes_loss
from tests.avalanche.streams import two_experiences

TRAINED = [name for name in strategies.names() if issubclass(strategies.get(name).Config, TrainingConfig)]
Vit = Callable[[], nn.Module]
NEW: dict[str, Any] = {
    "optimizer": "adamw",
    "schedule": "constant",
    "warm_up": 0.5,
    "label_smoothing": 0.2,
    "clip_norm": 1e-3,
}
"""Other values than the defaults of SGD."""


@pytest.fixture
def vit(tiny_vit: Callable[..., nn.Module]) -> Vit:
    return lambda: tiny_vit(width=16, heads=2, img_size=16, depth=2)


class Seen(SupervisedPlugin[Any]):
    """What every step of the first experience was made with."""

    def __init__(self) -> None:
        super().__init__()
        self.optimizers: list[Any] = []
        self.rates: list[float] = []
        self.norms: list[float] = []

    def after_update(self, strategy: Any, **_: Any) -> None:
        groups = strategy.optimizer.param_groups
        gradients = [p.grad.flatten() for group in groups for p in group["params"] if p.grad is not None]
        self.optimizers.append(strategy.optimizer)
        self.rates.append(float(groups[0]["lr"]))
        self.norms.append(float(torch.cat(gradients).norm()))


def trained(cls: type[AdapterStrategy], model: nn.Module, **options: Any) -> tuple[Any, Seen]:
    """A strategy after one experience: by default two epochs of two steps."""
    seen = Seen()
    values: dict[str, Any] = {"train_mb_size": 6, "train_epochs": 2, "lr": 0.08, "plugins": [seen]}
    strategy = cls(model=model, evaluator=None, seed=3, **values | options)
    strategy.train(two_experiences()[0])
    return strategy, seen


@pytest.mark.parametrize("name", TRAINED)
def test_every_strategy_trains_by_its_settings(name: str, vit: Vit) -> None:
    _, seen = trained(strategies.get(name), vit(), **NEW, momentum=0.7)
    assert {type(optimizer) for optimizer in seen.optimizers} == {AdamW}
    assert seen.optimizers[0].param_groups[0]["betas"] == (0.7, 0.999)
    assert seen.rates[:4] == pytest.approx([0.04, 0.08, 0.08, 0.08])
    assert max(seen.norms) <= 1.001e-3


@pytest.mark.parametrize(("optimizer", "kind"), [("sgd", SGD), ("adam", Adam), ("adamw", AdamW)])
def test_an_optimizer_by_its_name(optimizer: Any, kind: type, vit: Vit) -> None:
    """Also by position, where an object may stand; the settings record it."""
    _, seen = trained(MOS, vit(), optimizer=optimizer, momentum=0.5)
    assert {type(each) for each in seen.optimizers} == {kind}
    group = seen.optimizers[0].param_groups[0]
    assert group["momentum"] == 0.5 if kind is SGD else group["betas"] == (0.5, 0.999)
    strategy: Any = MOS(vit(), optimizer)
    assert strategy.config.optimizer == optimizer


@pytest.mark.parametrize(
    ("options", "rates"),
    [
        ({}, [0.08, 0.08, 0.04, 0.04]),
        ({"schedule": "constant"}, [0.08] * 4),
        ({"warm_up": 0.75, "schedule": "constant"}, [0.08 / 3, 0.16 / 3, 0.08, 0.08]),
        ({"warm_up": 1.0}, [0.02, 0.04, 0.03, 0.04]),
        ({"warm_up": 0.6, "schedule": "constant"}, [0.08 / 2.4, 0.16 / 2.4, 0.08, 0.08]),
    ],
)
def test_schedule_by_epoch_and_warm_up_by_step(options: dict[str, Any], rates: list[float], vit: Vit) -> None:
    assert trained(MOS, vit(), **options)[1].rates == pytest.approx(rates)


def test_warm_up_begins_anew_in_every_task(vit: Vit) -> None:
    strategy, seen = trained(MOS, vit(), warm_up=0.5, schedule="constant")
    strategy.train(two_experiences()[1])
    assert seen.rates == pytest.approx([0.04, 0.08, 0.08, 0.08] * 2)


def test_warm_up_with_an_own_optimizer(vit: Vit) -> None:
    options = {"lr": LAEConfig.lr, "optimizer": partial(AdamW, lr=0.01), "warm_up": 0.5}
    assert trained(LAE, vit(), **options)[1].rates == pytest.approx([0.005, 0.01, 0.01, 0.01])


def test_smoothing_is_that_of_the_criterion(vit: Vit) -> None:
    smooth = nn.CrossEntropyLoss(label_smoothing=0.3)
    found = [trained(MOS, vit(), **o)[0] for o in ({}, {"label_smoothing": 0.3}, {"criterion": smooth})]
    plain, named, given = (strategy.model.bank.export(0) for strategy in found)
    assert all(torch.equal(named[key], given[key]) for key in given)
    assert any(not torch.equal(named[key], plain[key]) for key in plain)


def test_clipping_shortens_long_gradients_only(vit: Vit) -> None:
    """To the last bit those of before where none is long."""
    (plain, seen), (loose, _), (tight, short) = (trained(MOS, vit(), clip_norm=norm) for norm in (None, 1e6, 1e-2))
    weights, same, other = (strategy.model.bank.export(0) for strategy in (plain, loose, tight))
    assert all(torch.equal(weights[key], same[key]) for key in weights)
    assert any(not torch.equal(weights[key], other[key]) for key in weights)
    assert min(seen.norms) > 1e-2
    assert short.norms == pytest.approx([1e-2] * 4, rel=1e-3)


class OwnPhases(Sequential):
    """As of a third party: one phase as it comes, and one with a schedule of its own."""

    def phases(self, task: int) -> Iterable[Phase]:
        group = self.head_group()
        yield Phase(name="plain", epochs=2, groups=(group,), loss=all_classes_loss)
        halved = dataclasses.replace(group, lr=1.0)
        yield Phase(
            name="own",
            epochs=2,
            groups=(halved,),
            loss=all_classes_loss,
            schedule=lambda lr, epoch, _: lr / (1 + epoch),
        )


def test_phases_of_a_third_party_get_the_recipe_and_keep_their_schedule(vit: Vit) -> None:
    _, seen = trained(OwnPhases, vit(), optimizer="adam", schedule="constant", head_lr_factor=1.0)
    assert {type(optimizer) for optimizer in seen.optimizers} == {Adam}
    assert seen.rates == [0.08] * 4 + [1.0, 1.0, 0.5, 0.5]


def test_old_settings_mean_and_look_what_they_did() -> None:
    for name in TRAINED:
        cls = strategies.get(name).Config
        assert not NEW.keys() & to_plain(cls()).keys(), "files of before stay as they were"
        config: Any = build(cls, {})
        wanted = ("adam", "constant") if name == "lae" else ("sgd", "cosine")
        assert (config.optimizer, config.schedule) == wanted
        assert (config.warm_up, config.label_smoothing, config.clip_norm) == (0, 0, None)
        given = build(cls, NEW)
        assert build(cls, to_plain(given)) == given


def test_presets_and_set_take_them() -> None:
    experiment = resolve("mos", "digits", seed=0, settings=NEW)
    config: Any = experiment.strategy_config
    assert {name: getattr(config, name) for name in NEW} == NEW
    assert (config.train_epochs, config.lr) == (8, 0.1), "the others of the preset stay"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"optimizer": "adamx"}, "optimizer.*'sgd', 'adam' or 'adamw', got 'adamx'"),
        ({"schedule": "step"}, "schedule.*'cosine' or 'constant', got 'step'"),
        ({"warm_up": 1.5}, "warm_up must be in"),
        ({"label_smoothing": 1.0}, "label_smoothing must be in"),
        ({"clip_norm": 0.0}, "clip_norm must be positive"),
        ({"optimizer": "adamw", "momentum": 1.0}, r"momentum must be in \[0, 1\)"),
        ({"optimizer": 3}, "optimizer has to be an optimizer"),
        ({"scheduler": LinearLR, "schedule": "constant"}, "schedule is a setting of the scheduler that was given"),
        ({"scheduler": LinearLR, "warm_up": 0.1}, "warm_up is a setting of the scheduler that was given"),
        ({"criterion": nn.CrossEntropyLoss(), "label_smoothing": 0.1}, "label_smoothing is a setting of the criterion"),
        (
            {"optimizer": SGD, "config": build(strategies.get("mos").Config, {"optimizer": "adam"})},
            "optimizer is a setting of the optimizer that was given: leave optimizer='adam' out",
        ),
    ],
)
def test_what_cannot_be_or_has_no_effect_is_refused_by_name(options: dict[str, Any], message: str, vit: Vit) -> None:
    with pytest.raises(ConfigError, match=message):
        MOS(model=vit(), **options)


def test_a_schedule_of_a_plugin_leaves_no_effect_to_that_of_the_settings(vit: Vit) -> None:
    own = SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    with pytest.raises(ConfigError, match="warm_up is a setting of the scheduler that was given"):
        MOS(model=vit(), optimizer=own, plugins=[LRSchedulerPlugin(StepLR(own, 1))], warm_up=0.2)


def test_a_strategy_that_trains_nothing_takes_no_optimizer_by_name_either(vit: Vit) -> None:
    with pytest.raises(ConfigError, match="trains nothing here, so optimizer= has no effect"):
        SimpleCIL(model=vit(), optimizer="adam")


def test_settings_made_in_python_are_checked_too() -> None:
    with pytest.raises(ConfigError, match="optimizer must be one of sgd, adam, adamw, got 'adamx'"):
        TrainingConfig(optimizer="adamx")  # type: ignore[arg-type]
