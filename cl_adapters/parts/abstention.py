"""The threshold below which an input is of none of the known classes; calibrated in :mod:`cl_adapters.openset`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cl_adapters.bank.routes import BARE
from cl_adapters.errors import ConfigError
from cl_adapters.features import LazyFeatures
from cl_adapters.model.state import ModelState
from cl_adapters.parts.base import Part, parts
from cl_adapters.parts.keys import keys_of
from cl_adapters.predictors.base import Prediction


@parts.register("abstention")
class Abstention(Part):
    """Refuse what is not similar enough to any key, or (where that is set) not answered with enough confidence.

    Args:
        similarity: least score of the nearest key under the bare backbone (a cosine, but where an index with another
            metric stands in the place of keys); None: not looked at.
        confidence: least of the largest softmax of the logits; None: not looked at.
        calibration: how the thresholds were found, as plain JSON.

    Raises:
        ConfigError: neither is given.
    """

    def __init__(
        self, similarity: float | None, confidence: float | None = None, calibration: Mapping[str, Any] | None = None
    ) -> None:
        super().__init__()
        if similarity is None and confidence is None:
            raise ConfigError("a threshold is needed on similarity, on confidence, or on both")
        self.similarity = similarity
        self.confidence = confidence
        self.calibration = dict(calibration or {})

    def applied(self, model: ModelState, features: LazyFeatures, prediction: Prediction) -> Prediction:
        """The prediction, with refused rows answered by the class means under the bare backbone.

        A prediction costs the bare pass, where its predictor has not asked for it already.
        """
        keys = keys_of(model)
        f_BD = features.under(BARE)
        refused_B = torch.zeros(len(f_BD), dtype=torch.bool, device=f_BD.device)
        if self.similarity is not None:
            refused_B |= keys.nearest(f_BD, 1)[0][:, 0] < self.similarity
        if self.confidence is not None:
            refused_B |= prediction.logits.float().softmax(1).amax(1) < self.confidence
        means_BC = F.normalize(f_BD.float(), dim=1) @ F.normalize(keys.means(), dim=1).T
        unknown = prediction.logits.shape[1] - means_BC.shape[1]  # classes whose task is still in training
        means_BC = F.pad(means_BC, (0, unknown), value=-torch.inf).to(prediction.logits)
        logits_BC = torch.where(refused_B[:, None], means_BC, prediction.logits)
        abstained_B = refused_B.cpu()
        return dataclasses.replace(
            prediction,
            logits=logits_BC,
            adapter=prediction.adapter.masked_fill(abstained_B, BARE),
            passes=features.passes_B,
            abstained=abstained_B,
        )

    def description(self) -> dict[str, Any]:
        """Thresholds, and how they were found."""
        return {"similarity": self.similarity, "confidence": self.confidence, "calibration": self.calibration}

    def tensors(self) -> dict[str, Tensor]:
        """None."""
        return {}

    @classmethod
    def restore(cls, description: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Abstention:
        """The same thresholds."""
        return cls(description["similarity"], description["confidence"], description["calibration"])
