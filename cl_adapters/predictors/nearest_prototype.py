"""The adapter of the task whose class prototype is nearest: retrieval in one hop."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from cl_adapters.config import check_range
from cl_adapters.features import LazyFeatures
from cl_adapters.model.state import ModelState
from cl_adapters.predictors.base import Prediction, Predictor, predictors


@predictors.register("nearest_prototype")
@dataclass(frozen=True, kw_only=True)
class NearestPrototype(Predictor):
    """Prototypes under one adapter name the task; that task's adapter and the linear head answer.

    Attributes:
        slot: the adapter under which prototypes were taken; -1 is the bare backbone.
    """

    summary: ClassVar[str] = "the adapter of the nearest class prototype's task; at most two passes"
    by_class: ClassVar[bool] = True

    slot: int = 0

    def __post_init__(self) -> None:
        check_range(self, "[-1, inf)", "slot")

    def predict(self, model: ModelState, features: LazyFeatures) -> Prediction:
        """Linear logits under the retrieved adapters."""
        nearest_B = model.prototypes(features.under(self.slot)).argmax(1).cpu()
        adapter_B = model.slot_of_column[nearest_B]
        return Prediction(model.head(features(features.rows, adapter_B)), adapter_B, features.passes_B)
