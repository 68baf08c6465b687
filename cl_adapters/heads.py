"""Classifier heads that grow with the classes: linear, and cosine to class prototypes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LinearHead(nn.Module):
    """Linear classifier whose rows are added as classes arrive.

    New rows are drawn from a normal truncated at two standard deviations (0.02, as timm's ViT heads), bias 0.

    Args:
        width: D of the features.
        init_std: standard deviation of new rows.
    """

    def __init__(self, width: int, init_std: float = 0.02) -> None:
        super().__init__()
        self.init_std = init_std
        self.weight = nn.Parameter(torch.empty(0, width))
        self.bias = nn.Parameter(torch.empty(0))

    @property
    def num_classes(self) -> int:
        """Rows C so far."""
        return self.weight.shape[0]

    @torch.no_grad()
    def grow(self, new_classes: int, generator: torch.Generator) -> None:
        """Append rows; the old ones keep their bytes. Replaces both parameters: make the optimizer afterwards."""
        rows = torch.empty(new_classes, self.weight.shape[1])
        nn.init.trunc_normal_(rows, std=self.init_std, a=-2 * self.init_std, b=2 * self.init_std, generator=generator)
        self.weight = nn.Parameter(torch.cat([self.weight, rows.to(self.weight)]))
        self.bias = nn.Parameter(torch.cat([self.bias, self.bias.new_zeros(new_classes)]))

    def forward(self, f_BD: Tensor) -> Tensor:
        """Logits [B, C] of features [B, D]."""
        return F.linear(f_BD, self.weight, self.bias)


class PrototypeHead(nn.Module):
    """Cosine similarity to one prototype per class; never trained by gradient.

    Source: SimpleCIL (Zhou et al. 2024, eq. 2) and the "fc" head of MOS with sigma = 1.

    Args:
        width: D of the features.
        sigma: factor on the cosine.
    """

    prototypes: Tensor

    def __init__(self, width: int, sigma: float = 1.0) -> None:
        super().__init__()
        self.sigma = sigma
        self.register_buffer("prototypes", torch.empty(0, width))

    @property
    def num_classes(self) -> int:
        """Prototypes C so far."""
        return self.prototypes.shape[0]

    @torch.no_grad()
    def append(self, means_CD: Tensor) -> None:
        """Append one row per new class: the mean feature, not normalised."""
        self.prototypes = torch.cat([self.prototypes, means_CD.to(self.prototypes)])

    def forward(self, f_BD: Tensor) -> Tensor:
        """Logits sigma * cos(f, prototype), [B, C]."""
        return self.sigma * F.linear(F.normalize(f_BD, dim=-1), F.normalize(self.prototypes, dim=-1))
