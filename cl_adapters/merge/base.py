"""What a merge method is: ``(tensors, **params) -> tensor`` without side effects; its signature is its schema."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from cl_adapters.registry import Registry


class MergeMethod(Protocol):
    """A pure function of several tensors of one shape."""

    def __call__(self, tensors: list[Tensor], /, *args: float, **params: float) -> Tensor:
        """Return a new tensor of the common shape."""


merges: Registry[MergeMethod] = Registry("merge method", "cl_adapters.merge")
