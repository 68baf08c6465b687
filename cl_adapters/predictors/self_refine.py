"""Self-refined retrieval of MOS: predict, look which task the prediction belongs to, use its adapter, repeat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from cl_adapters.bank.routes import BARE
from cl_adapters.config import check_range
from cl_adapters.features import LazyFeatures
from cl_adapters.model.state import ModelState
from cl_adapters.parts.keys import keys_of
from cl_adapters.predictors.base import Prediction, Predictor, predictors


@predictors.register("self_refine")
@dataclass(frozen=True, kw_only=True)
class SelfRefine(Predictor):
    """Self-refined retrieval (MOS, Sun et al. 2025, section on self-refined adapter retrieval; released mos.py).

    1. o = prototype logits under adapter 0; i = adapter of the class argmax o.
    2. At most ``max_steps`` times: z = linear logits under adapter i; j = adapter of argmax z; stop if j = i, else
       i <- j. The last z always comes from the last adapter that was evaluated.
    3. The answer is ``softmax(z) + softmax(T o)`` with T tasks so far; without ensemble z alone.

    An image costs 1 + (distinct further adapters visited) passes, at most 1 + ``max_steps``; the images that still
    change share one mixed batch per round. The released code runs all T adapters on every image instead.

    Attributes:
        max_steps: evaluations of z at most.
        ensemble: add o.
        start: where o comes from: the model's "prototypes" under adapter ``slot``, or its "keys".
        slot: the adapter under which the prototypes were taken.
    """

    summary: ClassVar[str] = "MOS: follow the predicted task's adapter until the prediction stays"
    by_class: ClassVar[bool] = True

    max_steps: int = 4
    ensemble: bool = True
    start: Literal["prototypes", "keys"] = "prototypes"
    slot: int = 0

    def __post_init__(self) -> None:
        check_range(self, "[1, inf)", "max_steps")
        check_range(self, "[-1, inf)", "slot")

    @property
    def needs_keys(self) -> bool:
        """Where it starts from them."""
        return self.start == "keys"

    @property
    def anchor(self) -> int:
        """The adapter under which the prototypes were taken, where they are used."""
        return self.slot if self.start == "prototypes" else BARE

    def predict(self, model: ModelState, features: LazyFeatures) -> Prediction:
        """Lazy retrieval with the logits of the version that runs every adapter."""
        slots = model.slot_of_column
        if self.start == "keys":
            o_BC = keys_of(model).class_scores(features.under(BARE), len(slots))
        else:
            o_BC = model.prototypes(features.under(self.slot))
        adapter_B = slots[o_BC.argmax(1).cpu()]
        z_BC = torch.zeros_like(o_BC)
        active = features.rows
        for step in range(self.max_steps):
            z_MC = model.head(features(active, adapter_B[active]))
            z_BC[active.to(z_BC.device)] = z_MC
            next_M = slots[z_MC.argmax(1).cpu()]
            moved = next_M != adapter_B[active]
            if step == self.max_steps - 1 or not moved.any():
                break
            active, next_M = active[moved], next_M[moved]
            adapter_B[active] = next_M
        logits_BC = z_BC.softmax(1) + (model.num_tasks * o_BC).softmax(1) if self.ensemble else z_BC
        return Prediction(logits_BC, adapter_B, features.passes_B)
