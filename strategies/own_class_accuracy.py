"""Training accuracy over the classes of the experience alone, beside Avalanche's over all classes so far.

A method that masks its loss to the new classes leaves the logits of old ones where they are, so that Avalanche's
training accuracy says little of what is being learned.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from avalanche.evaluation import GenericPluginMetric
from avalanche.evaluation.metrics.mean import Mean

from cl_adapters.strategies._loop.experiences import experience_classes


class OwnClassAccuracy(GenericPluginMetric[float, Mean]):
    """Share of the samples of the experience's classes for which, among these, the right one has the largest logit.

    Samples of other classes, such as those of a replay, are left out. NaN where no sample is left, and where the
    strategy gives labels in place of logits (labels beyond 65,535).

    Args:
        every: what it is reset before and measured after, "iteration" or "epoch" of training.
        name: of the curve.
    """

    def __init__(self, every: Literal["iteration", "epoch"], name: str) -> None:
        super().__init__(Mean(), reset_at=every, emit_at=every, mode="train")
        self._name = name
        self._labels: list[int] = []

    def before_training_exp(self, strategy: Any) -> None:
        """Note the classes."""
        super().before_training_exp(strategy)
        self._labels = experience_classes(strategy.experience)

    def update(self, strategy: Any) -> None:
        """Count a batch: ``strategy.mb_output`` float [B, L] by class label, ``strategy.mb_y`` [B]."""
        output, y_B = strategy.mb_output, strategy.mb_y
        labels = torch.tensor(self._labels, device=y_B.device)
        own_B = torch.isin(y_B, labels)
        if output.dim() == 2 and own_B.any():
            answers_M = labels[output[own_B][:, self._labels].argmax(1)]
            right = int((answers_M == y_B[own_B]).sum())
            self._metric.update(right / len(answers_M), len(answers_M))

    def result(self) -> float:
        """The accuracy since the last reset."""
        return self._metric.result() if self._metric.weight else math.nan

    def __str__(self) -> str:
        return self._name


def own_class_accuracy_metrics(*, minibatch: bool = False, epoch: bool = False) -> list[OwnClassAccuracy]:
    """Training accuracies over the classes of the experience, for Avalanche's ``EvaluationPlugin``.

    Their names say what they count; those of Avalanche's ``accuracy_metrics`` count over all classes so far.

    Args:
        minibatch: of every batch, "Top1_Acc_OwnClasses_MB".
        epoch: of every epoch, "Top1_Acc_OwnClasses_Epoch".
    """
    wanted: list[OwnClassAccuracy] = []
    if minibatch:
        wanted.append(OwnClassAccuracy("iteration", "Top1_Acc_OwnClasses_MB"))
    if epoch:
        wanted.append(OwnClassAccuracy("epoch", "Top1_Acc_OwnClasses_Epoch"))
    return wanted
