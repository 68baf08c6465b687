"""A ridge classifier on random projections."""

import torch

from cl_adapters.model.facade import AdapterModel
from cl_adapters.parts.ridge import Ridge, random_projection


def example(model: AdapterModel, generator: torch.Generator) -> Ridge:
    """Random weights of every class."""
    ridge = Ridge(random_projection(model.backbone.num_features, 24, generator))
    ridge.weights_CM = 0.1 * torch.randn(len(model.classes), 24, generator=generator)
    return ridge
