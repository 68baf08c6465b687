"""What a merge method is: ``(tensors, **params) -> tensor`` without side effects; its signature is its schema."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

from torch import Tensor

from cl_adapters.registry import Registry

MergeMethod: TypeAlias = Callable[..., Tensor]
"""``(tensors: list[Tensor], **params) -> Tensor``; the parameters differ, so the type says no more."""

merges: Registry[MergeMethod] = Registry("merge method", "cl_adapters.merge")
