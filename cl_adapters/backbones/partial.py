"""Forward passes of a backbone: whole, up to the input of a block, and on from there.

What is changed in an encoder for that is undone at once; callers hold its lock (:mod:`.exclusive`) meanwhile.
"""

from __future__ import annotations

import inspect
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from cl_adapters.backbones.hf_forward import (
    call,
    checked_tokens,
    dtype_of,
    dummy_input,
    modality_of,
    pooled_features,
    probe_input,
    upcast,
)
from cl_adapters.backbones.inputs import Inputs, as_inputs, check_finite
from cl_adapters.backbones.preprocessing import Preprocessing
from cl_adapters.backbones.tokens import from_mapping, is_tokens, mask_of, padded, unpadded
from cl_adapters.errors import ClAdaptersError, DataError, IncompatibleBackbone


@dataclass(frozen=True)
class ForwardPass:
    """A forward pass to come.

    Attributes:
        run: computes what the encoder returns.
        mask_BN: [B, n], which places are tokens; None: all.
        width: N of the texts as they were given, at least n; None: no texts.
        whole: whether ``run`` was given more than activations can carry from block to block.
    """

    run: Callable[[], Any]
    mask_BN: Tensor | None = None
    width: int | None = None
    whole: bool = False

    def until(self, block: nn.Module) -> Tensor:
        """The input of a block; of texts in one shape for every batch of width N, [B, N, D].

        Raises:
            ClAdaptersError: texts that came with more than tokens and their mask.
        """
        if self.whole:
            raise ClAdaptersError(
                "texts can be entered at a block as token ids with their attention_mask, and nothing beside these"
            )
        h = upcast(captured_input(block, self.run))
        if self.width is None or self.mask_BN is None:
            return h
        return padded(h, self.mask_BN, self.width)


def begin_pass(encoder: nn.Module, x: Inputs, preprocessing: Any, name: str) -> ForwardPass:
    """The pass over an input; see ``FrozenBackbone.forward``.

    Raises:
        DataError: the input is not the encoder's, or has numbers that are not finite.
    """
    x = checked_inputs(encoder, x, preprocessing, name)
    modality = modality_of(encoder)
    if modality == "text" and (isinstance(x, Tensor) or is_tokens(x)):
        tokens_BN = x if isinstance(x, Tensor) else from_mapping(x)
        packed_BN = checked_tokens(encoder, tokens_BN, name)
        mask_BN = mask_of(packed_BN)
        return ForwardPass(partial(call, encoder, packed_BN, mask_BN), mask_BN, tokens_BN.shape[1])
    if isinstance(x, Mapping):
        return ForwardPass(lambda: encoder(**x), x.get("attention_mask"), whole=modality == "text")
    return ForwardPass(partial(_encode if modality is None else call, encoder, x))


def resume_pass(
    encoder: nn.Module, blocks: Sequence[nn.Module], h: Tensor, block: int, tuple_size: int, preprocessing: Any
) -> ForwardPass:
    """The pass of an encoder of transformers from the input of a block on, as from :meth:`ForwardPass.until`."""
    width, mask_BN = None, None
    if modality_of(encoder) == "text":
        width = h.shape[1]
        h, mask_BN = unpadded(h)
    h = h.to(dtype_of(encoder))
    whole = partial(call, encoder, dummy_input(encoder, h, preprocessing), mask_BN)
    return ForwardPass(partial(run_from, blocks, block, h, tuple_size, whole), mask_BN, width)


def find_tuple_size(encoder: nn.Module, blocks: Sequence[nn.Module], pooling: str, preprocessing: Any) -> int | None:
    """How the blocks of an encoder of transformers return their activations, found with a small made-up input.

    Returns:
        As from :func:`tuple_size_of`; None where going on from a block does not give the features, or where it is no
        encoder of transformers.
    """
    if modality_of(encoder) is None:
        return None
    with without_hooks(encoder), torch.no_grad():
        try:
            first = begin_pass(encoder, probe_input(encoder, preprocessing), None, "")
            tuple_size = tuple_size_of(blocks[0], first.run)
            features = pooled_features(first.run(), pooling, first.mask_BN)
            near = 8 * torch.finfo(dtype_of(encoder)).eps * float(features.abs().max())
            for block in sorted({0, len(blocks) // 2, len(blocks) - 1}):
                second = resume_pass(encoder, blocks, first.until(blocks[block]), block, tuple_size, preprocessing)
                again = pooled_features(second.run(), pooling, second.mask_BN)
                if not torch.allclose(again, features, rtol=0, atol=near):
                    return None
        # whatever an encoder of unknown make says to being run like this
        except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError):
            return None
    return tuple_size


# --- leaving an encoder at a block, and entering it at one ------------------------------------------------------------


class _StoppedAtBlock(Exception):
    """Ends a forward pass at the input of a block."""

    def __init__(self, hidden: Tensor) -> None:
        super().__init__()
        self.hidden = hidden


def captured_input(block: nn.Module, run: Callable[[], Any]) -> Tensor:
    """What a block is given when ``run`` is called; nothing behind it is computed.

    Raises:
        IncompatibleBackbone: the block is never reached.
    """

    def stop(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        raise _StoppedAtBlock(args[0] if args else kwargs[_first_input(module)])

    handle = block.register_forward_pre_hook(stop, prepend=True, with_kwargs=True)
    try:
        run()
    except _StoppedAtBlock as reached:
        return reached.hidden
    finally:
        handle.remove()
    raise IncompatibleBackbone(f"a block of type {type(block).__name__} was never reached")


def tuple_size_of(block: nn.Module, run: Callable[[], Any]) -> int:
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


def run_from(blocks: Sequence[nn.Module], block: int, h: Tensor, tuple_size: int, run: Callable[[], Any]) -> Any:
    """What ``run`` returns when a block is given ``h``, and the blocks before it are left out.

    So the encoder itself makes what it hands its blocks beside the activations (masks, rotations, biases of positions)
    and what follows the last block, whatever it is called with. ``run`` is a pass with an input of the same shape.
    """

    def replace(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        return ((h, *args[1:]), kwargs) if args else (args, kwargs | {_first_input(module): h})

    with ExitStack() as undo:
        for module in blocks[:block]:
            undo.enter_context(_bypassed(module, tuple_size))
        handle = blocks[block].register_forward_pre_hook(replace, prepend=True, with_kwargs=True)
        undo.callback(handle.remove)
        return run()


@contextmanager
def without_hooks(module: nn.Module) -> Iterator[None]:
    """No hook of any module of ``module`` runs inside: routed adapters add nothing."""
    kept = [(part, part._forward_hooks, part._forward_pre_hooks) for part in module.modules()]
    for part, _, _ in kept:
        part._forward_hooks, part._forward_pre_hooks = OrderedDict(), OrderedDict()
    try:
        yield
    finally:
        for part, after, before in kept:
            part._forward_hooks, part._forward_pre_hooks = after, before


@contextmanager
def _bypassed(module: nn.Module, tuple_size: int) -> Iterator[None]:
    """The module gives back what it is given."""
    own = module.__dict__.get("forward")
    name = _first_input(module)

    def forward(*args: Any, **kwargs: Any) -> Any:
        given = args[0] if args else kwargs[name]
        return (given, *[None] * (tuple_size - 1)) if tuple_size else given

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


def _encode(encoder: Any, x: Tensor) -> Any:
    if hasattr(encoder, "forward_features") and hasattr(encoder, "forward_head"):
        return encoder.forward_head(encoder.forward_features(x), pre_logits=True)  # timm: leave the classifier out
    return encoder(x)


def checked_inputs(encoder: nn.Module, given: Any, preprocessing: Any, name: str) -> Inputs:
    """Inputs in tensors and types of numbers that the encoder takes; of texts and own modules only what is certain.

    Raises:
        DataError: another shape, whole numbers, or numbers that are not finite.
    """
    x = as_inputs(given)
    if modality_of(encoder) == "text":
        return x
    if isinstance(x, Mapping):
        pixels = x.get(str(getattr(encoder, "main_input_name", None)))
        if isinstance(pixels, Tensor):
            check_finite(pixels, name)
        try:
            inspect.signature(encoder.forward).bind(**x)
        except TypeError as error:
            raise DataError(
                f"backbone {name!r} does not take a dictionary of {list(x)} ({error}): give what its forward takes"
            ) from error
        return x
    for expected in _shapes_of_input(encoder, preprocessing):
        if not (x.is_floating_point() and _fits(x, expected)):
            raise DataError(
                f"backbone {name!r} takes {'images' if len(expected) == 3 else 'spectrograms'} "
                f"[B, {', '.join(map(str, expected))}], got {list(x.shape)} of type "
                f"{str(x.dtype).removeprefix('torch.')}: batches of float32 (a single one needs a first axis, "
                "x[None]), pixels scaled to [0, 1] and normalised as in the model's training; use "
                "backbone.preprocessing.eval_transform() on each image"
            )
    if x.is_floating_point():
        # an encoder of transformers is handed its own type anyway
        if modality_of(encoder) is None and x.dtype not in (torch.float32, dtype_of(encoder)):
            x = x.float()
        check_finite(x, name)
    return x


def _fits(x: Tensor, expected: tuple[int | str, ...]) -> bool:
    """Whether the axes behind the first are the expected ones; a name stands for any length."""
    sizes = tuple(x.shape[1:])
    return len(sizes) == len(expected) and all(
        isinstance(want, str) or want == size for want, size in zip(expected, sizes, strict=True)
    )


def _shapes_of_input(encoder: nn.Module, preprocessing: Any) -> list[tuple[int | str, ...]]:
    """Shapes that one image or spectrogram has to fit, with names for any length; none: it may take anything."""
    if isinstance(preprocessing, Preprocessing):
        return [preprocessing.input_size]
    if modality_of(encoder) == "audio":
        return [("T", "F")]
    of_timm = any(kind.__module__.startswith("timm.") for kind in type(encoder).__mro__)
    if of_timm:
        return [("C", "H", "W"), _shape_of_timm(encoder)]
    return [("C", "H", "W")] if modality_of(encoder) == "image" else []


def _shape_of_timm(encoder: nn.Module) -> tuple[int | str, ...]:
    """Channels of the first convolution, and the sides where patches of other images are refused."""
    patches: Any = getattr(encoder, "patch_embed", None)
    first = next((module for module in encoder.modules() if isinstance(module, nn.Conv2d)), None)
    sides = patches.img_size if getattr(patches, "strict_img_size", False) else None
    return ("C" if first is None else first.in_channels, *(sides or ("H", "W")))
