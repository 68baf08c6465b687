"""Classifier heads that grow with the classes: linear, and cosine to class prototypes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cl_adapters.errors import ClAdaptersError

Init = Callable[[Tensor, torch.Generator], object]
"""Fills new rows [C, D] in place; biases start at 0."""


def truncated_normal(std: float = 0.02) -> Init:
    """Normal, cut at two standard deviations (timm's ViT heads, MOS)."""
    return lambda rows, generator: nn.init.trunc_normal_(rows, std=std, a=-2 * std, b=2 * std, generator=generator)


def normal(std: float = 0.001) -> Init:
    """Normal (LAE, head/simple.py:57)."""
    return lambda rows, generator: rows.normal_(0, std, generator=generator)


def kaiming_uniform(rows: Tensor, generator: torch.Generator) -> object:
    """Uniform in +-1/sqrt(D): Kaiming with a = sqrt(5) (SEMA, models/sema.py:34-37)."""
    return rows.uniform_(-(rows.shape[1] ** -0.5), rows.shape[1] ** -0.5, generator=generator)


def linear_by_group(f_BD: Tensor, weight_CD: Tensor, bias_C: Tensor | None, groups: Sequence[int]) -> Tensor:
    """``f W^T + b``, [B, C], in one product per group of rows.

    The last bits of a matrix product depend on its shape. With a product of its own, what a group gives does not
    depend on which other groups there are.

    ``groups``: rows of each, C in all; empty: one product.
    """
    if not groups:
        return F.linear(f_BD, weight_CD, bias_C)
    biases = [None] * len(groups) if bias_C is None else bias_C.split(list(groups))
    parts = zip(weight_CD.split(list(groups)), biases, strict=True)
    return torch.cat([F.linear(f_BD, weight, bias) for weight, bias in parts], 1)


class LinearHead(nn.Module):
    """Linear classifier whose rows are added as classes arrive.

    Args:
        width: D of the features.

    Attributes:
        groups: see :func:`linear_by_group`; rows that are added end the grouping.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.groups: tuple[int, ...] = ()
        self.weight = nn.Parameter(torch.empty(0, width))
        self.bias = nn.Parameter(torch.empty(0))

    @property
    def num_classes(self) -> int:
        """Rows C so far."""
        return self.weight.shape[0]

    @torch.no_grad()
    def grow(self, new_classes: int, generator: torch.Generator, init: Init | None = None) -> None:
        """Append rows; the old ones keep their bytes. Replaces both parameters: make the optimizer afterwards."""
        self.groups = ()
        rows = torch.empty(new_classes, self.weight.shape[1])
        (init or truncated_normal())(rows, generator)
        self.weight = nn.Parameter(torch.cat([self.weight, rows.to(self.weight)]))
        self.bias = nn.Parameter(torch.cat([self.bias, self.bias.new_zeros(new_classes)]))

    def forward(self, f_BD: Tensor) -> Tensor:
        """Logits [B, C] of features [B, D].

        Raises:
            ClAdaptersError: there is no class yet.
        """
        if not self.num_classes:
            raise ClAdaptersError("this model has no linear head, which its predictor needs; take another predictor")
        return linear_by_group(f_BD, self.weight, self.bias, self.groups)


class PrototypeHead(nn.Module):
    """Cosine similarity to one prototype per class; never trained by gradient.

    Source: SimpleCIL (Zhou et al. 2024, eq. 2) and the "fc" head of MOS with sigma = 1.

    Args:
        width: D of the features.
        sigma: factor on the cosine.

    Attributes:
        groups: see :func:`linear_by_group`; rows that are added end the grouping.
    """

    prototypes: Tensor

    def __init__(self, width: int, sigma: float = 1.0) -> None:
        super().__init__()
        self.groups: tuple[int, ...] = ()
        self.sigma = sigma
        self.register_buffer("prototypes", torch.empty(0, width))

    @property
    def num_classes(self) -> int:
        """Prototypes C so far."""
        return self.prototypes.shape[0]

    @torch.no_grad()
    def append(self, means_CD: Tensor) -> None:
        """Append one row per new class: the mean feature, not normalised."""
        self.groups = ()
        self.prototypes = torch.cat([self.prototypes, means_CD.to(self.prototypes)])

    @torch.no_grad()
    def merge(self, columns: Sequence[int], means_KD: Tensor, share_K: Tensor) -> None:
        """Give these classes ``share_K`` (float64, in [0, 1]) of other means, and the rest of their own."""
        own_KD = self.prototypes[columns].double().cpu()
        merged_KD = own_KD.lerp(means_KD.double().cpu(), share_K[:, None])
        at_K = torch.tensor(columns, device=self.prototypes.device)
        self.prototypes = self.prototypes.index_copy(0, at_K, merged_KD.to(self.prototypes))

    def forward(self, f_BD: Tensor) -> Tensor:
        """Logits sigma * cos(f, prototype), [B, C]."""
        unit_CD = F.normalize(self.prototypes, dim=-1)
        return self.sigma * linear_by_group(F.normalize(f_BD, dim=-1), unit_CD, None, self.groups)
