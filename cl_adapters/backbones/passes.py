"""Forward passes of a backbone: from an input, and from the input of a block."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from cl_adapters.backbones.batches import Inputs
from cl_adapters.backbones.entering import input_of, outputs_of, run_from, without_hooks
from cl_adapters.backbones.hf_forward import blank, call, checked_tokens, dtype_of, made_up, modality_of, pooled, wide
from cl_adapters.backbones.preprocessing import Preprocessing
from cl_adapters.backbones.tokens import from_mapping, is_tokens, mask_of, padded, unpadded
from cl_adapters.errors import ClAdaptersError


@dataclass(frozen=True)
class Pass:
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
        h = wide(input_of(block, self.run))
        if self.width is None or self.mask_BN is None:
            return h
        return padded(h, self.mask_BN, self.width)


def begin(encoder: nn.Module, x: Inputs, preprocessing: Any, name: str) -> Pass:
    """The pass over an input; see ``FrozenBackbone.forward``.

    Args:
        encoder: of any kind.
        x: its input.
        preprocessing: of images, of texts, or None.
        name: of the backbone, for messages.

    Raises:
        ClAdaptersError: the input is not the encoder's.
    """
    modality = modality_of(encoder)
    if modality == "text" and (isinstance(x, Tensor) or is_tokens(x)):
        tokens_BN = x if isinstance(x, Tensor) else from_mapping(x)
        packed_BN = checked_tokens(encoder, tokens_BN, name)
        mask_BN = mask_of(packed_BN)
        return Pass(partial(call, encoder, packed_BN, mask_BN), mask_BN, tokens_BN.shape[1])
    if isinstance(x, Mapping):
        return Pass(lambda: encoder(**x), x.get("attention_mask"), whole=modality == "text")
    if isinstance(preprocessing, Preprocessing):
        _check_image(x, preprocessing.input_size, name)
    return Pass(partial(_encode if modality is None else call, encoder, x))


def go_on(
    encoder: nn.Module, blocks: Sequence[nn.Module], h: Tensor, block: int, outputs: int, preprocessing: Any
) -> Pass:
    """The pass of an encoder of transformers from the input of a block on.

    Args:
        encoder: of transformers.
        blocks: all of its blocks.
        h: as from :meth:`Pass.until`.
        block: index of the block.
        outputs: from :func:`how_blocks_return`.
        preprocessing: of the backbone.
    """
    width, mask_BN = None, None
    if modality_of(encoder) == "text":
        width = h.shape[1]
        h, mask_BN = unpadded(h)
    h = h.to(dtype_of(encoder))
    whole = partial(call, encoder, blank(encoder, h, preprocessing), mask_BN)
    return Pass(partial(run_from, blocks, block, h, outputs, whole), mask_BN, width)


def how_blocks_return(encoder: nn.Module, blocks: Sequence[nn.Module], pooling: str, preprocessing: Any) -> int | None:
    """How the blocks of an encoder of transformers return their activations, found with a small made-up input.

    Returns:
        As from :func:`cl_adapters.backbones.entering.outputs_of`; None where going on from a block does not give
        the features, or where it is no encoder of transformers.
    """
    if modality_of(encoder) is None:
        return None
    with without_hooks(encoder), torch.no_grad():
        try:
            first = begin(encoder, made_up(encoder, preprocessing), None, "")
            outputs = outputs_of(blocks[0], first.run)
            features = pooled(first.run(), pooling, first.mask_BN)
            near = 8 * torch.finfo(dtype_of(encoder)).eps * float(features.abs().max())
            for block in sorted({0, len(blocks) // 2, len(blocks) - 1}):
                second = go_on(encoder, blocks, first.until(blocks[block]), block, outputs, preprocessing)
                again = pooled(second.run(), pooling, second.mask_BN)
                if not torch.allclose(again, features, rtol=0, atol=near):
                    return None
        # whatever an encoder of unknown make says to being run like this
        except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError):
            return None
    return outputs


def _encode(encoder: Any, x: Tensor) -> Any:
    if hasattr(encoder, "forward_features") and hasattr(encoder, "forward_head"):
        return encoder.forward_head(encoder.forward_features(x), pre_logits=True)  # timm: leave the classifier out
    return encoder(x)


def _check_image(x: Tensor, expected: tuple[int, ...], name: str) -> None:
    if x.ndim != 4 or tuple(x.shape[1:]) != expected:
        raise ClAdaptersError(
            f"backbone {name!r} takes images [B, {', '.join(map(str, expected))}], got {list(x.shape)}; "
            "use backbone.preprocessing.eval_transform() on each image"
        )
