"""Two halves of an encoder: up to the input of a block, and on from there.

What is changed in the encoder for that is undone at once, and only the thread that asked for it sees it.
"""

from __future__ import annotations

import inspect
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from cl_adapters.errors import IncompatibleBackbone

_LOCK = threading.RLock()
"""Held while blocks are bypassed: that is a change of the encoder, undone at once."""


class _Reached(Exception):
    """Ends a forward pass at the input of a block."""

    def __init__(self, hidden: Tensor) -> None:
        super().__init__()
        self.hidden = hidden


def input_of(block: nn.Module, run: Callable[[], Any]) -> Tensor:
    """What a block is given when ``run`` is called; nothing behind it is computed.

    Raises:
        IncompatibleBackbone: the block is never reached.
    """
    thread = threading.get_ident()

    def stop(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if threading.get_ident() != thread:
            return
        raise _Reached(args[0] if args else kwargs[_first_input(module)])

    handle = block.register_forward_pre_hook(stop, prepend=True, with_kwargs=True)
    try:
        run()
    except _Reached as reached:
        return reached.hidden
    finally:
        handle.remove()
    raise IncompatibleBackbone(f"a block of type {type(block).__name__} was never reached")


def outputs_of(block: nn.Module, run: Callable[[], Any]) -> int:
    """How a block returns its activations when ``run`` is called: 0 as a tensor, n as the first of a tuple of n."""
    sizes: list[int] = []

    def note(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        sizes.append(len(output) if isinstance(output, (tuple, list)) else 0)

    handle = block.register_forward_hook(note)
    try:
        run()
    finally:
        handle.remove()
    return sizes[-1] if sizes else 0


def run_from(blocks: Sequence[nn.Module], block: int, h: Tensor, outputs: int, run: Callable[[], Any]) -> Any:
    """What ``run`` returns when a block is given ``h``, and the blocks before it are left out.

    So the encoder itself makes what it hands its blocks beside the activations (masks, rotations, biases of positions)
    and what follows the last block, whatever it is called with.

    Args:
        blocks: all of the encoder's.
        block: index of the first that is computed.
        h: its input.
        outputs: what a block returns, from :func:`outputs_of`.
        run: a forward pass with an input of the same shape.
    """
    thread = threading.get_ident()

    def replace(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
        if threading.get_ident() != thread:
            return None
        return ((h, *args[1:]), kwargs) if args else (args, kwargs | {_first_input(module): h})

    with _LOCK, ExitStack() as undo:
        for module in blocks[:block]:
            undo.enter_context(_bypassed(module, outputs))
        handle = blocks[block].register_forward_pre_hook(replace, prepend=True, with_kwargs=True)
        undo.callback(handle.remove)
        return run()


@contextmanager
def without_hooks(module: nn.Module) -> Iterator[None]:
    """No hook of any module of ``module`` runs inside: routed adapters add nothing."""
    with _LOCK:
        kept = [(part, part._forward_hooks, part._forward_pre_hooks) for part in module.modules()]
        for part, _, _ in kept:
            part._forward_hooks, part._forward_pre_hooks = OrderedDict(), OrderedDict()
        try:
            yield
        finally:
            for part, after, before in kept:
                part._forward_hooks, part._forward_pre_hooks = after, before


@contextmanager
def _bypassed(module: nn.Module, outputs: int) -> Iterator[None]:
    """The module gives back what it is given, to this thread; others compute as always."""
    thread, own, real = threading.get_ident(), module.__dict__.get("forward"), module.forward
    name = _first_input(module)

    def forward(*args: Any, **kwargs: Any) -> Any:
        if threading.get_ident() != thread:
            return real(*args, **kwargs)
        given = args[0] if args else kwargs[name]
        return (given, *[None] * (outputs - 1)) if outputs else given

    module.__dict__["forward"] = forward
    try:
        yield
    finally:
        del module.__dict__["forward"]
        if own is not None:
            module.__dict__["forward"] = own


def _first_input(module: nn.Module) -> str:
    """Name of the first parameter of a module's forward."""
    return next(iter(inspect.signature(module.forward).parameters))
