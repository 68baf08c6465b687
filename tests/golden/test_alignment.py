"""Classifier alignment against autograd and torch.optim.SGD, step by step on the same draws.

Origin: MOS, released code (mos.py:240-300): fresh SGD, momentum 0.9, the data set's weight decay, cosine to 0; every
epoch draws n features per class, shuffles all and takes C steps of n with plain cross-entropy.
"""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from cl_adapters.model.alignment import Alignment, align
from cl_adapters.model.heads import LinearHead
from cl_adapters.model.statistics import ClassStatistics, Covariance

CLASSES, WIDTH, DRAWS, EPOCHS = 5, 6, 8, 4
LR, MOMENTUM, DECAY = 0.05, 0.9, 5e-3


def reference(
    weight: torch.Tensor, bias: torch.Tensor, statistics: ClassStatistics, seed: int
) -> tuple[torch.Tensor, torch.Tensor]:
    w, b = weight.clone().requires_grad_(), bias.clone().requires_grad_()
    optimizer = torch.optim.SGD([w, b], lr=LR, momentum=MOMENTUM, weight_decay=DECAY)
    generator = torch.Generator().manual_seed(seed)
    for epoch in range(EPOCHS):
        optimizer.param_groups[0]["lr"] = LR * (1 + math.cos(math.pi * epoch / EPOCHS)) / 2
        features, labels = statistics.sample(DRAWS, generator)
        order = torch.randperm(CLASSES * DRAWS, generator=generator)
        for step in range(CLASSES):
            rows = order[step * DRAWS : (step + 1) * DRAWS]
            optimizer.zero_grad()
            F.cross_entropy(F.linear(features[rows], w, b), labels[rows]).backward()
            optimizer.step()
    return w.detach(), b.detach()


@pytest.mark.parametrize("covariance", ["full", "diagonal", "low_rank"])
def test_equals_autograd_and_torch_sgd(covariance: Covariance) -> None:
    generator = torch.Generator().manual_seed(3)
    statistics = ClassStatistics.of_kind(covariance, WIDTH)
    for _ in range(CLASSES):
        statistics.add(torch.randn(7, WIDTH, generator=generator) + torch.randn(WIDTH, generator=generator))
    head = LinearHead(WIDTH)
    head.grow(CLASSES, generator)
    with torch.no_grad():
        head.bias.normal_(generator=generator)
    start = head.weight.detach().clone(), head.bias.detach().clone()
    wanted = reference(*start, statistics, seed=11)
    settings = Alignment(epochs=EPOCHS, lr=LR, momentum=MOMENTUM, samples_per_class=DRAWS)
    align(head, statistics, settings, weight_decay=DECAY, generator=torch.Generator().manual_seed(11))
    assert (head.weight - wanted[0]).abs().max().item() < 1e-6
    assert (head.bias - wanted[1]).abs().max().item() < 1e-6
    assert (head.weight - start[0]).abs().max().item() > 0.05, "it did train"
    assert head.weight.requires_grad


def test_defaults_are_those_of_the_released_code() -> None:
    settings = Alignment()
    assert (settings.epochs, settings.lr, settings.momentum) == (30, 0.005, 0.9)
