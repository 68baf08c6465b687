"""What a strategy and its model were after the last finished experience, to go back to when the next one fails."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from avalanche.training.plugins.clock import Clock
from torch import Tensor, nn
from torch.optim import Optimizer


class Snapshot:
    """What an object held at one moment; :meth:`restore` puts it back in place, so that every reference stays valid.

    Followed are lists, dicts, sets, tuples, and the attributes of modules, of optimizers, of Avalanche's clock and of
    objects of this package. Anything else (data sets, plugins, objects of other packages) is kept as a reference.

    It costs one copy, on their device, of the parameters and buffers that are found and not ``fixed`` (what is trained,
    heads, prototypes, parts), and of tensors that ``root`` itself holds. Not copied are what an optimizer has gathered,
    since each phase begins anew, and tensors of objects such as class statistics, which replace them when they change.

    Args:
        root: an object of any class.
        apart: objects that are not followed.
        fixed: parameters that nobody writes into; of these only the flags are noted.
    """

    def __init__(self, root: object, apart: Iterable[object] = (), fixed: Iterable[nn.Parameter] = ()) -> None:
        self._contents: list[tuple[Any, Any]] = []
        self._tensors: list[tuple[Tensor, Tensor | None, bool, Tensor | None]] = []
        seen = {id(each): each for each in apart}  # with the objects, so that no other gets the number of one
        for each in fixed:
            self._note(each, seen, copied=False)
        self._note(vars(root), seen)

    def restore(self) -> None:
        """Put everything back; may be repeated after it was interrupted."""
        with torch.inference_mode():
            for tensor, copy, requires_grad, grad in self._tensors:
                if copy is not None:
                    tensor.copy_(copy)
                if tensor.is_leaf:
                    tensor.requires_grad_(requires_grad)
                    tensor.grad = grad
        for target, before in reversed(self._contents):  # the root, by which this is reached, comes last
            if isinstance(target, list):
                target[:] = before
                continue
            target.update(before)
            for new in set(target).difference(before):
                target.remove(new) if isinstance(target, set) else target.pop(new)

    def _note(self, value: Any, seen: dict[int, Any], copied: bool = True) -> None:
        """Note what an object holds; ``copied``: tensors in it may be written into."""
        if id(value) in seen:
            return
        seen[id(value)] = value
        inner: Iterable[Any] = ()
        if isinstance(value, Tensor):
            copy = value.detach().clone() if copied else None
            self._tensors.append((value, copy, value.requires_grad, value.grad if value.is_leaf else None))
        elif isinstance(value, list | dict | set):
            self._contents.append((value, value.copy()))
            inner = value.values() if isinstance(value, dict) else value
        elif isinstance(value, tuple):
            inner = value
        elif isinstance(value, nn.Module | Clock):
            inner, copied = (vars(value),), True
        elif isinstance(value, Optimizer):
            self._note(value.param_groups, seen)
            inner, copied = (value.state,), False
        elif type(value).__module__.startswith("cl_adapters."):
            inner, copied = (getattr(value, "__dict__", {}),), False
        for each in inner:
            self._note(each, seen, copied or (isinstance(each, nn.Parameter)))
