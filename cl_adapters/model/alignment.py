"""Classifier alignment: re-train the linear head on features drawn from the class Gaussians.

Source: MOS, released code (classifier alignment after every task but the first), after SLCA (Zhang et al. 2023).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from cl_adapters._precision import full_precision
from cl_adapters.config import check_range
from cl_adapters.model.heads import LinearHead
from cl_adapters.model.statistics import ClassStatistics


@dataclass(frozen=True, kw_only=True)
class Alignment:
    """Settings of the alignment.

    Attributes:
        epochs: passes; each draws fresh features.
        lr: learning rate of SGD, cosine to 0 over the epochs.
        momentum: of SGD.
        samples_per_class: features drawn per class and epoch; 0 means five training batches.
    """

    epochs: int = 30
    lr: float = 0.005
    momentum: float = 0.9
    samples_per_class: int = 0

    def __post_init__(self) -> None:
        check_range(self, "[0, inf)", "epochs", "samples_per_class")
        check_range(self, "(0, inf)", "lr")
        check_range(self, "[0, 1]", "momentum")


def cosine_lr(lr: float, epoch: int, epochs: int) -> float:
    """Learning rate of ``epoch`` (0-based): ``lr (1 + cos(pi epoch / epochs)) / 2``."""
    return 0.5 * lr * (1 + math.cos(math.pi * epoch / epochs))


@torch.no_grad()
def align(
    head: LinearHead,
    statistics: ClassStatistics,
    settings: Alignment,
    *,
    weight_decay: float,
    generator: torch.Generator,
) -> None:
    """Train ``head`` in place with plain cross-entropy over all classes on drawn features.

    Every epoch draws n features per class, shuffles them and takes C steps of n: the released schedule. The
    gradient of a linear softmax classifier is written out, so a step is two matrix products; the result is that
    of autograd with ``torch.optim.SGD``.

    Args:
        head: C rows, trained in place.
        statistics: of the same C classes.
        settings: ``samples_per_class`` n must be positive here.
        weight_decay: on weight and bias, as the phase of training has it.
        generator: of draws and shuffles, on the CPU.
    """
    n, classes = settings.samples_per_class, head.num_classes
    device = head.weight.device
    weight, bias = head.weight.detach().cpu().clone(), head.bias.detach().cpu().clone()
    pace = _Momentum(settings.momentum, weight_decay)
    with full_precision(weight.device):
        for epoch in range(settings.epochs):
            lr = cosine_lr(settings.lr, epoch, settings.epochs)
            features, labels = statistics.sample(n, generator)
            order = torch.randperm(len(labels), generator=generator)
            features, labels = features[order], labels[order]
            for step in range(classes):
                batch = slice(step * n, (step + 1) * n)
                _step(weight, bias, features[batch], labels[batch], lr, pace)
    head.weight.copy_(weight.to(device))
    head.bias.copy_(bias.to(device))


class _Momentum:
    """Velocity of SGD as in torch.optim: the first step sets it, later ones accumulate."""

    def __init__(self, momentum: float, weight_decay: float) -> None:
        self.momentum = momentum
        self.weight_decay = weight_decay
        self.velocity: dict[str, Tensor] = {}

    def move(self, key: str, value: Tensor, gradient: Tensor, lr: float) -> None:
        gradient.add_(value, alpha=self.weight_decay)
        if key in self.velocity:
            self.velocity[key].mul_(self.momentum).add_(gradient)
        else:
            self.velocity[key] = gradient
        value.add_(self.velocity[key], alpha=-lr)


def _step(weight_CD: Tensor, bias_C: Tensor, f_BD: Tensor, y_B: Tensor, lr: float, pace: _Momentum) -> None:
    """One step of SGD on mean cross-entropy; d loss / d logits = (softmax - one-hot) / B."""
    error_BC = torch.addmm(bias_C, f_BD, weight_CD.T).softmax(1)
    error_BC[torch.arange(len(y_B)), y_B] -= 1
    error_BC /= len(y_B)
    pace.move("weight", weight_CD, error_BC.T @ f_BD, lr)
    pace.move("bias", bias_C, error_BC.sum(0), lr)
