"""Routers with a row for every adapter in every block."""

import torch

from cl_adapters.model.facade import AdapterModel
from cl_adapters.parts.router import ExpandableRouter


def example(model: AdapterModel, generator: torch.Generator) -> ExpandableRouter:
    """Random routers."""
    assert model.bank is not None
    routers = ExpandableRouter(dict.fromkeys(model.bank.blocks, model.backbone.num_features))
    for block in model.bank.blocks:
        for slot in range(model.num_slots):
            routers.grow(block, slot, generator)
    return routers
