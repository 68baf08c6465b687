"""The table of known backbones: which structure has which sites. One row per family."""

from __future__ import annotations

from torch import nn

from cl_adapters.errors import IncompatibleBackbone
from cl_adapters.sites.sites import Family
from cl_adapters.sites.timm import TIMM_FAMILIES
from cl_adapters.sites.transformers import TEXT_DECODERS, TEXT_ENCODERS
from cl_adapters.sites.vision import VISION_TRANSFORMERS

FAMILIES: tuple[Family, ...] = (*TIMM_FAMILIES, *TEXT_ENCODERS, *TEXT_DECODERS, *VISION_TRANSFORMERS)


def find_family(encoder: nn.Module) -> Family:
    """The family of ``encoder``.

    Raises:
        IncompatibleBackbone: no family of the table matches.
    """
    for family in FAMILIES:
        if family.matches(encoder):
            return family
    known = "; ".join(family.name for family in FAMILIES)
    raise IncompatibleBackbone(
        f"no known adapter sites in {type(encoder).__name__}. Known structures: {known}. For another structure pass "
        "the sites yourself: FrozenBackbone.wrap(module, sites=[Site(...)], ...)"
    )
