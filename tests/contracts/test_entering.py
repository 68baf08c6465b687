"""Computing a backbone in two halves, before and from a block: the same features, or a refusal before anything else."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor

from cl_adapters.adapters import adapters
from cl_adapters.adapters.base import AdapterType, adapter_from
from cl_adapters.bank.bank import BARE, AdapterBank, Route
from cl_adapters.errors import IncompatibleBackbone

PLAIN = ("ViT", "DeiT", "DINOv2", "CLIP", "SigLIP", "drop path")
"""Beginnings of the families whose features are norm(blocks(x)) with nothing else handed to the blocks."""


def resumable(case: Any) -> bool:
    """Those, and encoders of transformers, which are run with the blocks before left out.

    But for one that convolves what its first block was given: that is gone once the block was entered.
    """
    if getattr(getattr(case.backbone.encoder, "encoder", None), "conv", None) is not None:
        return False
    return str(case.family).startswith(PLAIN) or hasattr(case.backbone.encoder, "main_input_name")


def same(a: Tensor, b: Tensor) -> bool:
    """Equal bit for bit; NaN stands where a text has no token."""
    return torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(), b.nan_to_num())


def test_halves_give_the_features_or_are_refused(case: Any) -> None:
    backbone, x = case.backbone, case.inputs(3)
    plain = backbone.features(x)
    for block in range(backbone.depth + 1):
        h = backbone.enter(x, block)
        assert torch.equal(backbone.features(x), plain), "no hook was left behind"
        if resumable(case) or block == backbone.depth:
            assert torch.equal(backbone.resume(h, block), plain)
        else:
            with pytest.raises(IncompatibleBackbone, match=r"cannot be entered at a block"):
                backbone.resume(h, block)
    if resumable(case):
        backbone.check_resumable()
    else:
        with pytest.raises(IncompatibleBackbone, match=r"cannot be entered at a block"):
            backbone.check_resumable()


def bank_or_none(backbone: Any, adapter: AdapterType, filled: Any) -> AdapterBank | None:
    """A filled bank; None where the backbone has no places for the type and says so."""
    try:
        bank: AdapterBank = filled(backbone, adapter)
    except IncompatibleBackbone as refused:
        if re.search(r"needs feature maps|no sites of kind", str(refused)) is None:
            raise
        return None
    return bank


@pytest.mark.parametrize("adapter", [pytest.param(adapter_from(name), id=name) for name in adapters.names()])
def test_halves_with_routed_adapters(case: Any, adapter: AdapterType, filled: Any) -> None:
    """Routed in both halves; a site on the edge of the halves acts once."""
    backbone, x = case.backbone, case.inputs(5)
    if not resumable(case):
        with pytest.raises(IncompatibleBackbone, match="set cached_views=0"):
            backbone.check_resumable()
        return
    bank = bank_or_none(backbone, adapter, filled)
    if bank is None:
        assert adapter.layout == "map" or "normed" in case.family or hasattr(backbone.encoder, "main_input_name")
        return
    for route in (Route.single(1), Route.hard(torch.tensor([2, 0, BARE, 1, 0]))):
        with bank.route(route):
            whole = backbone.features(x)
            for block in range(backbone.depth + 1):
                halves = backbone.resume(backbone.enter(x, block), block)
                assert torch.equal(halves, whole)
        for block in range(1, backbone.depth):  # bare below, as in a frozen prefix
            with bank.route({site.name: route for site in bank.sites if site.block >= block}):
                above = backbone.features(x)
                bare = backbone.enter(x, block)
                assert torch.equal(backbone.resume(bare, block), above)
            assert same(backbone.enter(x, block), bare)


def test_rows_may_be_entered_one_by_one(case: Any) -> None:
    """Cached activations come back in other batches."""
    if not resumable(case):
        return
    backbone, x = case.backbone, case.inputs(4)
    plain, h = backbone.features(x), backbone.enter(x, 1)
    for rows in ([2], [3, 0, 1]):
        assert torch.allclose(backbone.resume(h[rows], 1), plain[rows], atol=1e-5)


def test_a_subclass_that_computes_otherwise_is_refused(tiny_vit: Any) -> None:
    from timm.models.vision_transformer import VisionTransformer

    from cl_adapters.backbones.frozen import FrozenBackbone

    class Doubled(VisionTransformer):
        def forward_features(self, x: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
            features: torch.Tensor = super().forward_features(x) * 2
            return features

    model = tiny_vit()
    model.__class__ = Doubled
    backbone = FrozenBackbone.wrap(model)
    with pytest.raises(IncompatibleBackbone, match="cannot be entered"):
        backbone.resume(backbone.enter(torch.zeros(2, 3, 32, 32), 1), 1)
