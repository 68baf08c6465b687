"""The folder format of Hugging Face PEFT for LoRA, as far as both directions need it.

    adapter_config.json          peft_type, r, lora_alpha, target_modules, ...
    adapter_model.safetensors    base_model.model.MODULE.lora_A.weight [r, D] and ....lora_B.weight [O, r]
    cl_adapters.json             ours, which PEFT ignores: the backbone's fingerprint and the adapter type

PEFT adds (lora_alpha / r) B A x to the output of MODULE, and always to all of it. Where a backbone has query, key and
value in one fused projection [q | k | v], our sites are its thirds; their adapters become one with stacked factors,

    A = [A_k; A_v],   B = [[0, 0], [B_k, 0], [0, B_v]]     (rows: q, k, v)
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import get_args

from cl_adapters.adapters.lora import Target
from cl_adapters.backbones.frozen import FrozenBackbone
from cl_adapters.errors import IncompatibleBackbone
from cl_adapters.sites.sites import Site, Tap

CONFIG = "adapter_config.json"
TENSORS = "adapter_model.safetensors"
PICKLE = "adapter_model.bin"
OURS = "cl_adapters.json"
PREFIX = "base_model.model."
SCHEMA_VERSION = 1


def by_module(sites: Iterable[Site]) -> dict[str, list[Site]]:
    """The sites on each linear layer, of a fused projection by thirds.

    Raises:
        IncompatibleBackbone: a site reads or adds elsewhere than at one layer's input and output.
    """
    found: dict[str, list[Site]] = {}
    for site in sites:
        module = site.target.module
        if site.source != Tap(module, "in") or site.target != Tap(module, "out"):
            raise IncompatibleBackbone(
                f"site {site.name!r} reads {site.source.module!r} and adds to {module!r}; PEFT's LoRA knows only the "
                "input and output of one linear layer"
            )
        found.setdefault(module, []).append(site)
    return {module: sorted(at, key=lambda site: site.qkv_part or 0) for module, at in found.items()}


def lora_layers(backbone: FrozenBackbone) -> dict[str, list[Site]]:
    """The sites on each linear layer of the backbone that LoRA knows."""
    return by_module(site for kind in get_args(Target) for site in _sites(backbone, kind))


def _sites(backbone: FrozenBackbone, kind: str) -> tuple[Site, ...]:
    try:
        return backbone.sites(kind)
    except IncompatibleBackbone:
        return ()


def rows_of(site: Site) -> slice:
    """The rows of the layer's weight that the site adds to."""
    start = (site.qkv_part or 0) * site.out_width
    return slice(start, start + site.out_width)


def height_of(sites: list[Site]) -> int:
    """Rows of the weight of the layer that has these sites."""
    return sites[0].out_width * (1 if sites[0].qkv_part is None else 3)


def origin(backbone: FrozenBackbone) -> dict[str, str]:
    """What our file says about the backbone."""
    return {"name": backbone.name, "fingerprint": backbone.fingerprint}
