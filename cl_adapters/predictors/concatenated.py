"""Class means on features under several adapters, concatenated."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from cl_adapters.features import LazyFeatures
from cl_adapters.model.state import ModelState
from cl_adapters.parts.class_means import ClassMeans
from cl_adapters.predictors.base import Prediction, Predictor, predictors


@predictors.register("concatenated")
@dataclass(frozen=True, kw_only=True)
class Concatenated(Predictor):
    """The model's part "class_means" answers on the concatenated features: one pass per adapter.

    Attributes:
        slots: adapters in the order of the concatenation; -1 is the bare backbone.
    """

    summary: ClassVar[str] = "APER: cosine to class means on the bare and the adapted features, concatenated"

    slots: tuple[int, ...] = (-1, 0)

    def __post_init__(self) -> None:
        if min(self.slots, default=-2) < -1:
            raise ValueError(f"slots must be adapters from 0, or -1 for the bare backbone, got {list(self.slots)}")

    def predict(self, model: ModelState, features: LazyFeatures) -> Prediction:
        """Cosines to the class means; the adapter that is named is the last."""
        f_BW = torch.cat([features.under(slot) for slot in self.slots], dim=1)
        logits_BC = model.part("class_means", ClassMeans)(f_BW)
        return Prediction(logits_BC, torch.full((features.batch,), self.slots[-1]), features.passes_B)
