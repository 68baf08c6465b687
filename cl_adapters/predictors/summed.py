"""All adapters at once, their outputs added."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from cl_adapters.bank.routes import BARE, Route
from cl_adapters.features import LazyFeatures
from cl_adapters.model.state import ModelState
from cl_adapters.parts.keys import keys_of
from cl_adapters.predictors.base import Prediction, Predictor, predictors


@predictors.register("summed")
@dataclass(frozen=True, kw_only=True)
class Summed(Predictor):
    """Every input under the sum of all adapters (O-LoRA, Wang et al. 2023, section 3): one pass.

    No adapter was trained to answer without the others, so such a model is no pool. Where the linear head does not
    know all classes, as in language models, the keys name a class from the bare features. The adapter that is named
    is that of the class.
    """

    summary: ClassVar[str] = "all adapters at once, their outputs added (O-LoRA); one pass"
    remembers: ClassVar[bool] = False
    sums: ClassVar[bool] = True

    def predict(self, model: ModelState, features: LazyFeatures) -> Prediction:
        """Linear logits on the features under the sum, or scores of the classes' keys."""
        classes = len(model.classes)
        if model.head.num_classes == classes:
            shares_BT = torch.ones(features.batch, model.num_slots, device=model.device)
            f_BD = features.mixed(Route.soft(shares_BT)) if model.num_slots else features.under(BARE)
            logits_BC = model.head(f_BD)
        else:
            logits_BC = keys_of(model).class_scores(features.under(BARE), classes)
        adapter_B = model.slot_of_column[logits_BC.argmax(1).cpu()]
        return Prediction(logits_BC, adapter_B, features.passes_B)
