"""The adapter that most of the nearest keys vote for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from cl_adapters.bank.routes import BARE
from cl_adapters.features import LazyFeatures
from cl_adapters.model.state import ModelState
from cl_adapters.parts.keys import TEMPERATURE, answered, check_neighbours, keys_of, weights_of
from cl_adapters.predictors.base import Prediction, Predictor, predictors


@predictors.register("knn_vote")
@dataclass(frozen=True, kw_only=True)
class KNNVote(Predictor):
    """The k nearest keys vote for the adapters of their classes, each with exp(cosine / temperature).

    The weighted vote of Wu et al. 2018 ("Unsupervised feature learning via non-parametric instance discrimination",
    section 3.4), over adapters instead of classes. Most useful with many keys per class ("features"). At most 2
    passes, as :class:`cl_adapters.predictors.nearest_key.NearestKey`.

    Attributes:
        k: keys that vote.
        temperature: small ones let the nearest decide, large ones count heads. The default is for cosines; with an
            index of another metric in the place of keys one has to be chosen.
    """

    summary: ClassVar[str] = "the nearest keys vote for adapters; at most two passes"
    by_class: ClassVar[bool] = True

    k: int = 10
    temperature: float = TEMPERATURE

    def __post_init__(self) -> None:
        check_neighbours(self.k, self.temperature)

    @property
    def needs_keys(self) -> bool:
        """Always."""
        return True

    def predict(self, model: ModelState, features: LazyFeatures) -> Prediction:
        """Linear logits under the elected adapters."""
        bare_BD = features.under(BARE)
        keys = keys_of(model)
        best_BK, column_BK = keys.nearest(bare_BD, self.k)
        weight_BK = weights_of(best_BK, keys, self.temperature).cpu()  # 0 where fewer were found
        slot_BK = model.slot_of_column[column_BK.cpu()]
        votes_BT = weight_BK.new_zeros(len(weight_BK), model.num_slots + 1)  # the bare backbone stands first
        adapter_B = votes_BT.scatter_add(1, slot_BK + 1, weight_BK).argmax(1) - 1
        f_BD = features(features.rows, adapter_B)
        return Prediction(answered(model, f_BD, bare_BD), adapter_B, features.passes_B)
