"""How long an average of adapters has been accumulating: the offline expert of LAE."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from cl_adapters.parts.base import Part, parts


@parts.register("accumulation")
class Accumulation(Part):
    """Steps of ``ema <- decay * ema + (1 - decay) * online``; the average itself is an adapter of the bank.

    Args:
        steps: taken so far.

    Attributes:
        steps: int64 scalar.
    """

    steps: Tensor

    def __init__(self, steps: int = 0) -> None:
        super().__init__()
        self.register_buffer("steps", torch.tensor(steps, dtype=torch.int64))

    def count(self) -> None:
        """One step more."""
        self.steps += 1

    def description(self) -> dict[str, Any]:
        """Nothing besides the tensor."""
        return {}

    @classmethod
    def restore(cls, description: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Accumulation:
        """The part with that number of steps.

        Raises:
            KeyError: no number of steps.
        """
        return cls(int(tensors["steps"]))
