"""Which kinds of sites every family has, and the bank or refusal that follows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from torch import Tensor

from cl_adapters.adapters.base import AdapterType
from cl_adapters.backbones.frozen import FrozenBackbone
from cl_adapters.backbones.inputs import Inputs
from cl_adapters.bank.bank import AdapterBank
from cl_adapters.errors import IncompatibleBackbone
from cl_adapters.sites.sites import Layout

AROUND = ("attn_parallel", "attn_sequential", "attn_before")
FFN = ("ffn_parallel", "ffn_sequential", "ffn_before")
LINEAR = ("query", "key", "value")
LAYERS = ("output", "up", "down")
NORMS = ("attn_norm", "ffn_norm")
KINDS = (*AROUND, *FFN, *NORMS, "block_parallel", *LINEAR, *LAYERS, "gate", "attention")
GATED = (
    "Llama",
    "Mistral: sliding window",
    "Qwen2",
    "Qwen3",
    "Gemma",
    "Gemma 2",
    "Gemma 3",
    "transformers DINOv2, SwiGLU",
)
"""The families with a gate of its own beside the way up."""
SHARED = ("attn_before", "ffn_before")
"""Missing where the input of the branches is the residual stream, or belongs to both."""

LACKS: dict[str, tuple[str, ...]] = {
    "ViT, normed queries and keys": ("attention",),
    "ViT, normed attention": ("attention",),
    "DINOv2 giant: SwiGLU": ("up",),  # up and gate are one layer
    "EVA: rotary, SwiGLU": (*LINEAR, "up", "attention"),  # computes with qkv.weight, the module is never called
    "EVA, post-norm": (*LINEAR, "attention"),
    "EVA, one projection without a bias": ("attention",),
    "EVA, three projections": (*LINEAR, "attention"),
    "BEiT: relative positions": (*LINEAR, "attention"),
    "BEiT: shared relative positions, no bias": ("attention",),
    "relative positions": ("attention",),
    "relative positions, residual post-norm": ("attention",),
    "XCiT: attention over channels": ("attention",),
    "Hiera: fewer and wider tokens": (*AROUND, "block_parallel", *LINEAR, "output", "attention"),
    "SAM: windows and a neck": (*AROUND, "block_parallel", *LINEAR, "output", "attention"),
    "Swin: shifted windows": ("attention",),
    "Swin: padded windows": ("attention",),
    "ConvNeXt": (*AROUND, "attn_norm", *LINEAR, *LAYERS, "attention"),
    "ConvNeXt, MLP of convolutions": (*AROUND, *NORMS, *LINEAR, *LAYERS, "attention"),
    "BERT": SHARED,
    "DistilBERT": SHARED,
    "MPNet": (*SHARED, "attention"),
    "DeBERTa": (*SHARED, *LINEAR, "attention"),  # query, key and value lie head by head in one projection
    "DeBERTa-v2": (*SHARED, "attention"),
    "DeBERTa-v3": (*SHARED, "query", "key", "attention"),  # these two run once more, on the positions
    "ModernBERT": ("up",),  # up and gate are one layer
    "Phi": (*SHARED, "ffn_norm"),  # one norm for both
    "Phi-3": ("up",),
    "Phi-3, grouped keys": ("up", *LINEAR),  # no thirds: keys are fewer than queries
}
"""The kinds of sites that a family does not have; those that are not named have all of them."""


def lacks_of(family: str) -> tuple[str, ...]:
    return LACKS.get(family, ()) + (() if family in GATED else ("gate",))


def layout_of(family: str, kind: str) -> Layout:
    if family.startswith("Swin"):
        return "tokens" if kind in (*LINEAR, *LAYERS, *FFN, "ffn_norm") else "grid"
    if family.startswith("ConvNeXt"):
        return "grid" if kind in NORMS else "map"
    return "tokens"


def routed(bank: AdapterBank, backbone: FrozenBackbone, x: Inputs, route: Any) -> Tensor:
    with bank.route(route):
        return backbone.features(x)


def fitting(case: Any, adapter: AdapterType, make: Callable[[], AdapterBank]) -> AdapterBank | None:
    """The bank; None where the family has no such sites, and then the error says which it has."""
    lacks = lacks_of(case.family)
    missing = [kind for kind in adapter.site_kinds if kind in lacks]
    in_a_row = adapter.layout == "map" and layout_of(case.family, adapter.site_kinds[0]) == "tokens"
    if not missing and not in_a_row:
        return make()
    message = rf"no sites of kind '{missing[0]}'.*; it has: .*ffn_parallel" if missing else "needs feature maps"
    with pytest.raises(IncompatibleBackbone, match=message):
        make()
    return None
