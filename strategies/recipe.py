"""The training recipe: what settings name, and what a user brings instead: an optimizer, a schedule, a criterion."""

from __future__ import annotations

import copy
import dataclasses
import inspect
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeAlias, TypeVar

import torch
from avalanche.core import BasePlugin
from avalanche.training.plugins import LRSchedulerPlugin
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from cl_adapters.errors import ConfigError
from cl_adapters.model.alignment import cosine_lr
from cl_adapters.strategies.config import OptimizerName, ScheduleName, StrategyConfig, TrainingConfig
from cl_adapters.strategies.phases import Phase, Schedule, constant_lr

MakeOptimizer: TypeAlias = Callable[[Iterable[nn.Parameter]], Optimizer]
"""Such as ``torch.optim.AdamW`` or ``partial(torch.optim.AdamW, lr=1e-3)``."""
MakeScheduler: TypeAlias = Callable[[Optimizer], Any]
"""Such as ``partial(torch.optim.lr_scheduler.LinearLR, total_iters=3)``."""
Criterion: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""From logits float [B, C] and right columns int64 [B] to a scalar."""

C = TypeVar("C", bound=TrainingConfig)
SETTINGS = ("lr", "weight_decay", "momentum", "optimizer")
"""Fields of :class:`TrainingConfig` that an optimizer brings along."""
BROUGHT: Mapping[str, Sequence[str]] = {
    "optimizer": SETTINGS,
    "scheduler": ("schedule", "warm_up"),
    "criterion": ("label_smoothing",),
}
"""What may be given as an object: the fields that have no effect then."""
OPTIMIZERS: Mapping[OptimizerName, Callable[[list[nn.Parameter], float], Optimizer]] = {
    "sgd": lambda params, momentum: torch.optim.SGD(params, lr=1.0, momentum=momentum),
    "adam": lambda params, momentum: torch.optim.Adam(params, lr=1.0, betas=(momentum, 0.999)),
    "adamw": lambda params, momentum: torch.optim.AdamW(params, lr=1.0, betas=(momentum, 0.999)),
}
"""Learning rate and weight decay come with the groups of each phase."""
SCHEDULES: Mapping[ScheduleName, Schedule] = {"cosine": cosine_lr, "constant": constant_lr}


def own_optimizer(config: StrategyConfig) -> Optimizer:
    """The optimizer of the settings. Its parameters each phase replaces; torch refuses an empty one."""
    make = OPTIMIZERS[getattr(config, "optimizer", "sgd")]
    return make([nn.Parameter(torch.zeros(1), requires_grad=False)], getattr(config, "momentum", 0.0))


class Pace:
    """The learning rates of one phase by the settings: by epoch, and in warm-up by step.

    Args:
        phase: its own schedule, where it has one, goes before that of the settings.
        config: the settings.
        steps: optimizer steps per epoch.
    """

    def __init__(self, phase: Phase, config: StrategyConfig, steps: int) -> None:
        schedule = phase.schedule or SCHEDULES[getattr(config, "schedule", "cosine")]
        self._phase = dataclasses.replace(phase, schedule=schedule)
        self._rising = getattr(config, "warm_up", 0.0) * phase.epochs * steps
        self._epoch = self._step = 0

    def begin_epoch(self, optimizer: Optimizer, epoch: int) -> None:
        """Set the rates of ``epoch`` (0-based)."""
        self._epoch = epoch
        self._phase.set_epoch(optimizer, epoch)

    def before_step(self, optimizer: Optimizer) -> None:
        """Set those of the next step while they rise; the last rising step has the schedule's own."""
        if self._step < self._rising:
            self._step += 1
            self._phase.set_epoch(optimizer, self._epoch, min(1.0, self._step / self._rising))


def check_unused(config: StrategyConfig, given: str) -> None:
    """Check that no field was set that has no effect beside what was given.

    Args:
        config: the settings.
        given: "optimizer", "scheduler" or "criterion".

    Raises:
        ConfigError: names the first that was.
    """
    defaults = {each.name: each.default for each in dataclasses.fields(config)}
    for name in filter(defaults.__contains__, BROUGHT[given]):
        value = getattr(config, name)
        if value != defaults[name]:
            raise ConfigError(f"{name} is a setting of the {given} that was given: leave {name}={value!r} out")


class Dial:
    """A user's optimizer: its class and settings, and the learning rate that schedules turn it to.

    A schedule of torch is bound to one optimizer and the number of its groups, while a strategy trains other parameters
    in every phase. So the user's object keeps its own groups and is never stepped; the strategy's optimizer is a copy
    without parameters, whose learning rates move in proportion.

    Args:
        optimizer: with one group; its parameters do not matter.

    Raises:
        ConfigError: several groups, or an optimizer that wants a closure.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        name = type(optimizer).__name__
        if len(optimizer.param_groups) != 1:
            raise ConfigError(
                f"{name} has {len(optimizer.param_groups)} groups of parameters; which parameters are trained, and in "
                "which groups, is the method's: give an optimizer with one group, or its class"
            )
        if isinstance(optimizer, torch.optim.LBFGS):
            raise ConfigError("LBFGS wants a closure, which Avalanche's loop does not have; take another optimizer")
        self.optimizer = optimizer
        optimizer._opt_called = True  # type: ignore[attr-defined]  # schedules warn where nobody steps
        self._begin = self._now()
        self.lr = float(self._begin.get("initial_lr", self._begin["lr"]))

    @classmethod
    def of(cls, given: Optimizer | MakeOptimizer) -> Dial:
        """From an optimizer, its class, or any function of parameters.

        Raises:
            ConfigError: it is none of them.
        """
        made = given([nn.Parameter(torch.zeros(1))]) if callable(given) else given
        if not isinstance(made, Optimizer):
            raise ConfigError(f"optimizer has to be an optimizer, or a function that makes one, got {given!r}")
        return cls(made)

    def new_optimizer(self) -> Optimizer:
        """An optimizer of the same class and settings, without parameters."""
        made = copy.copy(self.optimizer)
        made.defaults = {name: self._begin.get(name, value) for name, value in self.optimizer.defaults.items()}
        made.param_groups, made.state = [], defaultdict(dict)
        return made

    def settings(self, config: C) -> C:
        """The configuration with the optimizer's learning rate, momentum and weight decay.

        Raises:
            ConfigError: one of them was set there too.
        """
        check_unused(config, "optimizer")
        own: dict[str, Any] = {"weight_decay": float(self._begin.get("weight_decay", 0.0))}
        if "momentum" in self._begin:
            own["momentum"] = float(self._begin["momentum"])
        return dataclasses.replace(config, lr=self.lr, **own)

    def turn(self, optimizer: Optimizer, base_lrs: Sequence[float]) -> None:
        """Give an optimizer what schedules have made of the settings, in proportion to each group's own rate."""
        now = self._now()
        for group, lr in zip(optimizer.param_groups, base_lrs, strict=True):
            group["lr"] = lr * float(now["lr"]) / self.lr
            group |= {name: now[name] for name in ("momentum", "betas") if now.get(name) != self._begin.get(name)}

    def begin_here(self) -> None:
        """Take the settings of this moment for those of the beginning."""
        self._begin = self._now()

    def reset(self) -> None:
        """Be as at the beginning."""
        self.optimizer.param_groups[0].update(copy.deepcopy(self._begin))

    def _now(self) -> dict[str, Any]:
        return {
            name: copy.deepcopy(value) for name, value in self.optimizer.param_groups[0].items() if name != "params"
        }


class Schedules:
    """Learning rate schedules of torch that begin anew in every phase.

    Args:
        dial: the optimizer to which they are bound.
        scheduler: makes one that is stepped after every epoch; None: none.
        plugins: of the strategy; those that schedule are found.

    Raises:
        ConfigError: a schedule of another optimizer, one that cannot be stepped by epoch, or one that would not begin
            anew.
    """

    def __init__(self, dial: Dial | None, scheduler: MakeScheduler | None, plugins: Sequence[BasePlugin]) -> None:
        owners = [plugin for plugin in plugins if isinstance(plugin, LRSchedulerPlugin)]
        if not all(plugin.reset_scheduler and plugin.reset_lr for plugin in owners):
            raise ConfigError(
                "schedules begin anew in every phase of every experience, so LRSchedulerPlugin cannot have "
                "reset_scheduler=False or reset_lr=False: leave them out"
            )
        found = [plugin.scheduler for plugin in owners]
        for each in found:
            if dial is None or each.optimizer is not dial.optimizer:
                raise ConfigError(
                    f"the {type(each).__name__} of LRSchedulerPlugin belongs to another optimizer: pass that one as "
                    "optimizer= too, and its class and settings are used with this schedule in every phase"
                )
        self.dial = dial
        self.by_epoch = None if scheduler is None or dial is None else scheduler(dial.optimizer)
        if isinstance(self.by_epoch, ReduceLROnPlateau):
            raise ConfigError(
                "ReduceLROnPlateau follows a metric: pass it in LRSchedulerPlugin(..., metric='train_loss')"
            )
        if self.by_epoch is not None and not isinstance(self.by_epoch, LRScheduler):
            raise ConfigError(f"scheduler has to make a schedule from an optimizer, got {self.by_epoch!r}")
        self._all = [*found, *([] if self.by_epoch is None else [self.by_epoch])]
        self._begin = [copy.deepcopy(each.state_dict()) for each in self._all]
        if dial is not None:
            dial.begin_here()  # schedules set the first rate when they are made

    def __bool__(self) -> bool:
        return bool(self._all)

    def reset(self) -> None:
        """Begin anew."""
        if self.dial is not None:
            self.dial.reset()
        for each, begin in zip(self._all, self._begin, strict=True):
            each.load_state_dict(copy.deepcopy(begin))

    def after_epoch(self) -> None:
        """Step the schedule that goes by epochs; plugins step their own."""
        if self.by_epoch is not None:
            self.by_epoch.step()


def without_recipe(config: C) -> C:
    """The configuration before :meth:`Dial.settings`."""
    defaults = {each.name: each.default for each in dataclasses.fields(config) if each.name in SETTINGS}
    return dataclasses.replace(config, **defaults)  # type: ignore[arg-type]


def check_criterion(criterion: Any) -> None:
    """Check a user's criterion.

    Raises:
        ConfigError: nothing that can be called with logits and columns; weights of classes; one of Avalanche's that
            follows labels by itself.
    """
    name = type(criterion).__name__
    if not callable(criterion):
        raise ConfigError(f"criterion has to be callable with logits and the right columns, got {criterion!r}")
    if isinstance(criterion, BasePlugin):
        raise ConfigError(
            f"{name} masks classes by itself, as the methods here do already: take torch.nn.CrossEntropyLoss(...)"
        )
    if getattr(criterion, "weight", None) is not None:
        raise ConfigError(
            f"{name} has weights of classes, but a loss sees the columns of some classes, in order of arrival: leave "
            "weight= out"
        )
    if getattr(criterion, "reduction", "mean") == "none":
        raise ConfigError(f"{name} with reduction='none' gives no scalar: take 'mean' or 'sum'")
    try:
        inspect.signature(criterion).bind(None, None)
    except TypeError as error:
        raise ConfigError(f"criterion has to be callable with logits and the right columns: {error}") from error
