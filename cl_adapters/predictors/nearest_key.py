"""The adapter of the class whose key is nearest to the bare backbone: retrieval in one hop, trained by nobody."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from cl_adapters.bank.routes import BARE
from cl_adapters.features import LazyFeatures
from cl_adapters.model.state import ModelState
from cl_adapters.parts.keys import answered, keys_of
from cl_adapters.predictors.base import Prediction, Predictor, predictors


@predictors.register("nearest_key")
@dataclass(frozen=True, kw_only=True)
class NearestKey(Predictor):
    """The key with the largest cosine to the bare feature names a class; its adapter and the linear head answer.

    At most 2 passes; where all adapters sit in late blocks, 1 and the share of those blocks. Needs the model's part
    "class_keys" (:class:`cl_adapters.parts.keys.KeyLookup`).
    """

    summary: ClassVar[str] = "the adapter of the class with the nearest key; at most two passes"
    by_class: ClassVar[bool] = True

    @property
    def needs_keys(self) -> bool:
        """Always."""
        return True

    def predict(self, model: ModelState, features: LazyFeatures) -> Prediction:
        """Linear logits under the retrieved adapters."""
        bare_BD = features.under(BARE)
        _, nearest_B1 = keys_of(model).nearest(bare_BD, 1)
        adapter_B = model.slot_of_column[nearest_B1[:, 0].cpu()]
        f_BD = features(features.rows, adapter_B)
        return Prediction(answered(model, f_BD, bare_BD), adapter_B, features.passes_B)
