"""Small strategies, and what is compared of their models."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from cl_adapters.model.facade import AdapterModel
from cl_adapters.strategies.base import strategies

SMALL: dict[str, Any] = {
    "train_epochs": 3,
    "train_mb_size": 6,
    "lr": 0.05,
    "adapter": {"type": "bottleneck", "bottleneck": 4},
    "alignment": {"epochs": 2},
    "projection": 24,
    "descriptor_epochs": 2,
}


def make(name: str, model: Any, **options: Any) -> Any:
    """A small strategy of that registered name; settings of other strategies are left out."""
    cls: Any = strategies.get(name)
    known = {field.name for field in dataclasses.fields(cls.Config)}
    foreign = SMALL.keys() - known | ({"lr"} if "optimizer" in options else set())
    given = {"evaluator": None, **SMALL, **options}
    return cls(model, seed=0, **{key: value for key, value in given.items() if key not in foreign})


def train(strategy: Any, stream: Iterable[Any]) -> Any:
    for experience in stream:
        strategy.train(experience)
    return strategy


def state(model: AdapterModel) -> dict[str, Any]:
    """Every tensor of a model, and what it knows of its classes."""
    found: dict[str, Any] = {key: value.clone() for key, value in model.state_dict().items()}
    if model.statistics is not None:
        found |= {f"statistics.{key}": value.clone() for key, value in model.statistics.tensors().items()}
    found["classes"] = (list(model.classes), model.task_of_column.tolist(), dict(model.returned), dict(model.samples))
    return found


def differing(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """What differs between two states, bit for bit."""

    def same(a: Any, b: Any) -> bool:
        return torch.equal(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) else bool(a == b)

    return [key for key in one.keys() | other.keys() if not same(one.get(key), other.get(key))]
