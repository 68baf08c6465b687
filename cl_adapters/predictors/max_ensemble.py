"""The most confident of several adapters, class by class: the ensemble of LAE."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from cl_adapters.features import LazyFeatures
from cl_adapters.model.state import ModelState
from cl_adapters.predictors.base import Prediction, Predictor, predictors


@predictors.register("max_ensemble")
@dataclass(frozen=True, kw_only=True)
class MaxEnsemble(Predictor):
    """p = max(softmax(z_online), softmax(z_offline)), element-wise (LAE, Gao et al. 2023; released main.py:226-240).

    The answer's logits are log p; its adapter is the one that gave the largest entry (the first of them where they
    are equal). As many passes per sample as there are slots.

    Attributes:
        slots: adapters whose probabilities are compared.
    """

    summary: ClassVar[str] = "LAE: element-wise maximum of the class probabilities under several adapters"

    slots: tuple[int, ...] = (0, 1)

    def __post_init__(self) -> None:
        if not self.slots or len(set(self.slots)) < len(self.slots):
            raise ValueError(f"slots must be different adapters, at least one, got {list(self.slots)}")
        if min(self.slots) < -1:
            raise ValueError(f"slots must be adapters from 0, or -1 for the bare backbone, got {list(self.slots)}")

    def predict(self, model: ModelState, features: LazyFeatures) -> Prediction:
        """log p of the linear head; the maximum is taken of logarithms, which a small probability survives."""
        log_p_SBC = torch.stack([model.head(features.under(slot)).log_softmax(1) for slot in self.slots])
        best_BC, winner_BC = log_p_SBC.max(0)
        winner_B = winner_BC.gather(1, best_BC.argmax(1, keepdim=True)).flatten().cpu()
        return Prediction(best_BC, torch.tensor(self.slots)[winner_B], features.passes_B)
