"""Means of features without and with the first adapter."""

import torch

from cl_adapters.model.facade import AdapterModel
from cl_adapters.parts.class_means import ClassMeans


def example(model: AdapterModel, generator: torch.Generator) -> ClassMeans:
    """A random mean of every class."""
    width = 2 * model.backbone.num_features
    means = ClassMeans(width)
    means.head.append(torch.randn(len(model.classes), width, generator=generator))
    return means
