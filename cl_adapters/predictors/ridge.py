"""The ridge classifier on the features under one adapter."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from cl_adapters.config import check_range
from cl_adapters.features import LazyFeatures
from cl_adapters.model.state import ModelState
from cl_adapters.parts.ridge import Ridge
from cl_adapters.predictors.base import Prediction, Predictor, predictors


@predictors.register("ridge")
@dataclass(frozen=True, kw_only=True)
class RidgeClassifier(Predictor):
    """The model's part "ridge" answers on the features under one adapter: one pass.

    Attributes:
        slot: the adapter; -1 is the bare backbone.
    """

    summary: ClassVar[str] = "RanPAC: ridge regression on random projections of the features under one adapter"

    slot: int = 0

    def __post_init__(self) -> None:
        check_range(self, "[-1, inf)", "slot")

    def predict(self, model: ModelState, features: LazyFeatures) -> Prediction:
        """relu(f W) (G + ridge I)^-1 S."""
        logits_BC = model.part("ridge", Ridge)(features.under(self.slot))
        return Prediction(logits_BC, torch.full((features.batch,), self.slot), features.passes_B)
