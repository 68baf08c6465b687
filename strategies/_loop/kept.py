"""What plugins and metrics keep from one experience to the next: what JSON holds, and tensors."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from avalanche.evaluation.metrics import TrainedExperienceAccuracy, TrainedExperienceTopkAccuracy
from avalanche.evaluation.metrics.forgetting_bwt import GenericExperienceForgetting
from avalanche.evaluation.metrics.forward_transfer import GenericExperienceForwardTransfer
from avalanche.training.plugins import EarlyStoppingPlugin, LRSchedulerPlugin
from torch import Tensor

from cl_adapters.errors import ConfigError
from cl_adapters.strategies.own_class_accuracy import OwnClassAccuracy

State = dict[str, Any]

_BEGIN_ANEW = (EarlyStoppingPlugin, LRSchedulerPlugin, OwnClassAccuracy)
"""What begins anew in every experience; ``LRSchedulerPlugin`` because schedules do in every phase."""
_RESET = {
    "accuracy",
    "class_accuracy",
    "confusion_matrix",
    "cpu_usage",
    "disk_usage",
    "gpu_usage",
    "images_samples",
    "labels_repartition",
    "loss",
    "mac",
    "ram_usage",
    "timing",
    "topk_acc",
}
"""Modules of Avalanche's metrics that are reset before they measure again."""


def state_of(thing: Any) -> State | None:
    """What a plugin or metric keeps; None: nobody knows.

    Anything with ``state_dict()`` and ``load_state_dict(state)`` speaks for itself.
    """
    if callable(getattr(thing, "state_dict", None)) and callable(getattr(thing, "load_state_dict", None)):
        return dict(thing.state_dict())
    if isinstance(thing, GenericExperienceForgetting):
        pairs = {"initial": thing.forgetting.initial, "last": thing.forgetting.last}
        return {"experience": thing.train_exp_id} | {name: _pairs(values) for name, values in pairs.items()}
    if isinstance(thing, GenericExperienceForwardTransfer):
        pairs = {"initial": thing.forward_transfer.initial, "previous": thing.forward_transfer.previous}
        named = {"experience": thing.train_exp_id, "at_init": thing.at_init}
        return named | {name: _pairs(values) for name, values in pairs.items()}
    if isinstance(thing, TrainedExperienceAccuracy | TrainedExperienceTopkAccuracy):
        return {"experience": thing._current_experience}
    package, _, module = type(thing).__module__.rpartition(".")
    reset = package == "avalanche.evaluation.metrics" and module in _RESET
    return {} if reset or isinstance(thing, _BEGIN_ANEW) else None


def restore(thing: Any, state: State) -> None:
    """Give a new plugin or metric what :func:`state_of` said.

    Raises:
        Exception: of any kind; it cannot be.
    """
    if callable(getattr(thing, "load_state_dict", None)):
        thing.load_state_dict(state)
    elif isinstance(thing, GenericExperienceForgetting):
        thing.train_exp_id = _number(state["experience"])
        thing.forgetting.initial = _unpaired(state["initial"])
        thing.forgetting.last = _unpaired(state["last"])
    elif isinstance(thing, GenericExperienceForwardTransfer):
        thing.train_exp_id = _number(state["experience"])
        thing.at_init = state["at_init"] is True
        thing.forward_transfer.initial = _unpaired(state["initial"])
        thing.forward_transfer.previous = _unpaired(state["previous"])
    elif isinstance(thing, TrainedExperienceAccuracy | TrainedExperienceTopkAccuracy):
        thing._current_experience = _number(state["experience"]) or 0


def keeps_data(plugin: Any) -> bool:
    """Whether it is one of Avalanche's plugins, or made from one, without a way to ask it what it keeps."""
    return any(kind.__module__.startswith("avalanche.training.") for kind in type(plugin).__mro__)


def split(owner: str, state: Mapping[str, Any]) -> tuple[State, dict[str, Tensor]]:
    """What JSON holds, and tensors.

    Raises:
        ConfigError: something is neither.
    """
    tensors = {key: value.detach().cpu().clone() for key, value in state.items() if isinstance(value, Tensor)}
    plain = {key: value for key, value in state.items() if key not in tensors}
    try:
        same = json.loads(json.dumps(plain, allow_nan=False)) == plain and all(isinstance(key, str) for key in state)
    except (TypeError, ValueError):
        same = False
    if not same:
        raise ConfigError(
            f"the state_dict of {owner} has more than a file without pickle holds: names to tensors, or to texts, "
            "finite numbers, lists, and dictionaries whose keys are texts"
        )
    return plain, tensors


def _pairs(values: Mapping[int, float]) -> list[list[float]]:
    """JSON has no keys that are numbers."""
    return [[int(key), float(value)] for key, value in values.items()]


def _unpaired(pairs: Any) -> dict[int, float]:
    found = {_number(key): value for key, value in pairs}
    if None in found or not all(type(value) in (int, float) for value in found.values()):
        raise TypeError(f"{pairs!r} are no values by experience")
    return {key: float(value) for key, value in found.items() if key is not None}


def _number(value: Any) -> int | None:
    if value is None or (type(value) is int and value >= 0):
        return value
    raise TypeError(f"{value!r} is no number of an experience")
