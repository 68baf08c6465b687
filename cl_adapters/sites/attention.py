"""Sites inside the attentions of transformers, between the projections: queries after their rotation, and the mask.

An attention of transformers hands queries, keys, values and its mask to a function that it looks up by the name in its
config. While such an attention of an adapted model runs, that name is ours; our function calls the one whose name stood
there before, and lets the adapters of that attention add to what it puts out. Before and after, nothing is changed: no
other model, and not the making of the masks, which depends on the same name. Nothing here imports transformers.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, MutableMapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from cl_adapters.errors import IncompatibleBackbone

Add = Callable[[Tensor, Tensor], Tensor]
"""From what the heads put out, [B, N, H, hd], and what adapters read, [B, N, H * hd + H], to the new output."""

_NAME = "cl_adapters"
_FUNCTIONS = "ALL_ATTENTION_FUNCTIONS"
_INSIDE = "_cl_adapters_inside"
_MASKED = ("eager", "sdpa")
"""The functions that are given their whole mask; flash attention is not."""


@dataclass
class _Inside:
    """What one attention needs to know while it runs."""

    name: str | None
    previous: Callable[..., tuple[Tensor, Any]]
    additions: list[Add] = field(default_factory=list)


def looks_up(attention: nn.Module) -> bool:
    """Whether an attention asks transformers for the function by name (older ones, MPNet and DeBERTa do not)."""
    forward: Any = inspect.unwrap(type(attention).forward)
    code = getattr(forward, "__code__", None)
    own = getattr(attention, "reorder_and_upcast_attn", False) or hasattr(attention, "sinks")
    return (
        code is not None
        and _FUNCTIONS in code.co_names
        and "eager_attention_forward" in forward.__globals__
        and not own
    )


def enter(attention: nn.Module, add: Add) -> None:
    """From now on until :func:`leave`, ``add`` changes what the heads of this attention put out.

    Raises:
        IncompatibleBackbone: its function is not given the mask of the tokens.
    """
    inside: _Inside | None = vars(attention).get(_INSIDE)
    if inside is None:
        known: dict[str, Any] = inspect.unwrap(type(attention).forward).__globals__
        functions: MutableMapping[str, Any] = known[_FUNCTIONS]
        config: Any = attention.config
        name = config._attn_implementation or "eager"
        if name not in _MASKED:
            raise IncompatibleBackbone(
                f"adapters inside the attention need attn_implementation {' or '.join(map(repr, _MASKED))}, the model "
                f'has {name!r}: model.set_attn_implementation("sdpa")'
            )
        functions[_NAME] = _attend
        inside = _Inside(config._attn_implementation_internal, known["eager_attention_forward"])
        if name in functions:
            inside.previous = functions[name]
        vars(attention)[_INSIDE] = inside
        config._attn_implementation_internal = _NAME  # the public name would also set those of the config's parts
    inside.additions.append(add)


def leave(attention: nn.Module) -> None:
    """Undo every :func:`enter`."""
    inside: _Inside | None = vars(attention).pop(_INSIDE, None)
    if inside is not None:
        config: Any = attention.config
        config._attn_implementation_internal = inside.name


def _attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, Any]:
    """Called by the attention in place of its own function."""
    inside: _Inside = vars(module)[_INSIDE]
    heads, weights = inside.previous(module, query, key, value, attention_mask, **options)
    read = _read(module, query, key, attention_mask, inside.name == "sdpa", options)
    for add in inside.additions:
        heads = add(heads, read)
    return heads, weights


def _read(
    module: nn.Module, query: Tensor, key: Tensor, mask: Tensor | None, sdpa: bool, options: dict[str, Any]
) -> Tensor:
    """[B, N, H * hd + H]: queries, scaled, and per head the log of the sum of exp of a token's logits."""
    scale, cap, causal = (options.get(name) for name in ("scaling", "softcap", "is_causal"))
    full = torch.promote_types(query.dtype, torch.float32)
    query = query.to(full) * (query.shape[-1] ** -0.5 if scale is None else scale)
    key = key.to(full).repeat_interleave(query.shape[1] // key.shape[1], 1)
    logits = query @ key.mT
    if cap is not None:
        logits = cap * torch.tanh(logits / cap)
    causal = getattr(module, "is_causal", True) if causal is None else causal
    if mask is None and sdpa and causal and query.shape[2] > 1:  # as sdpa itself decides
        mask = torch.ones(logits.shape[-2:], dtype=torch.bool, device=logits.device).tril()
    if mask is not None:
        mask = mask[..., : logits.shape[-1]]
        lowest = torch.finfo(logits.dtype).min
        logits = logits.masked_fill(~mask, lowest) if mask.dtype == torch.bool else (logits + mask).clamp_min(lowest)
    total_BNH = logits.logsumexp(-1).transpose(1, 2)
    return torch.cat([query.transpose(1, 2).flatten(2), total_BNH], -1)
