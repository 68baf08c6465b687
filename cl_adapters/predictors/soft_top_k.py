"""A mixture of the few adapters whose keys are nearest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from cl_adapters.bank.routes import BARE, Route
from cl_adapters.features import LazyFeatures
from cl_adapters.model.state import ModelState
from cl_adapters.parts.keys import TEMPERATURE, answered, check_neighbours, keys_of, weights_of
from cl_adapters.predictors.base import Prediction, Predictor, predictors


@predictors.register("soft_top_k")
@dataclass(frozen=True, kw_only=True)
class SoftTopK(Predictor):
    """Outputs of the k adapters with the nearest keys, weighted by softmax(cosine / temperature) at every site.

    An adapter is as near as the nearest key of its classes. Where the bare backbone is among them, its share adds
    nothing. 2 passes, or 1 and the share of the late blocks; the mixed features are those of no single adapter, and no
    memory keeps them.

    Attributes:
        k: adapters that are mixed.
        temperature: small ones let the nearest decide. The default is for cosines; with an index of another metric in
            the place of keys one has to be chosen.
    """

    summary: ClassVar[str] = "the k adapters with the nearest keys, mixed by similarity; two passes"
    remembers: ClassVar[bool] = False
    by_class: ClassVar[bool] = True

    k: int = 3
    temperature: float = TEMPERATURE

    def __post_init__(self) -> None:
        check_neighbours(self.k, self.temperature)

    @property
    def needs_keys(self) -> bool:
        """Always."""
        return True

    def predict(self, model: ModelState, features: LazyFeatures) -> Prediction:
        """Linear logits on the mixed features; the adapter that is named has the largest share."""
        bare_BD = features.under(BARE)
        owner_C = model.slot_of_column.to(bare_BD.device) + 1  # the bare backbone stands first
        keys = keys_of(model)
        near_BT = keys.owner_scores(bare_BD, owner_C, model.num_slots + 1, self.k)
        best_BK = near_BT.topk(min(self.k, near_BT.shape[1]), dim=1)
        share_BK = weights_of(best_BK.values, keys, self.temperature)  # 0 for adapters without a key
        share_BT = torch.zeros_like(near_BT).scatter(1, best_BK.indices, share_BK)[:, 1:]
        mixes = bool((share_BT != 0).any())
        f_BD = features.mixed(Route.soft(share_BT)) if mixes else bare_BD
        adapter_B = best_BK.indices[:, 0].cpu() - 1
        return Prediction(answered(model, f_BD, bare_BD), adapter_B, features.passes_B)
