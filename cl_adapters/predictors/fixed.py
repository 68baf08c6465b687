"""One adapter for every input."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from cl_adapters.config import check_range
from cl_adapters.features import LazyFeatures
from cl_adapters.model.state import ModelState
from cl_adapters.predictors.base import Prediction, Predictor, predictors


@predictors.register("fixed")
@dataclass(frozen=True, kw_only=True)
class Fixed(Predictor):
    """The same adapter for every input: one pass.

    Attributes:
        slot: the adapter; -1 is the bare backbone.
        head: "linear", or "prototype" (cosine to class means, as SimpleCIL).
    """

    summary: ClassVar[str] = "one adapter (or none) for every input"
    by_class: ClassVar[bool] = True

    slot: int = -1
    head: Literal["linear", "prototype"] = "linear"

    def __post_init__(self) -> None:
        check_range(self, "[-1, inf)", "slot")

    def predict(self, model: ModelState, features: LazyFeatures) -> Prediction:
        """Logits of the chosen head on the features under ``slot``."""
        f_BD = features.under(self.slot)
        logits_BC = model.head(f_BD) if self.head == "linear" else model.prototypes(f_BD)
        return Prediction(logits_BC, torch.full((features.batch,), self.slot), features.passes_B)
