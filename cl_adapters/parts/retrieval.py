"""What the predictors share that look an input up among the keys: no training, one pass of the bare backbone.

B batch, C classes, M keys, T adapters.
"""

from __future__ import annotations

from torch import Tensor

from cl_adapters.errors import ClAdaptersError
from cl_adapters.model.state import ModelState
from cl_adapters.parts.keys import KeyLookup


def keys_of(model: ModelState) -> KeyLookup:
    """The model's keys, or the index that stands in their place.

    Raises:
        ClAdaptersError: it has none; says how to get them.
    """
    found = dict(model.parts.items()).get("class_keys")
    if not isinstance(found, KeyLookup):
        raise ClAdaptersError(
            "this model has no keys to look inputs up by: train it with keys='prototypes' (or 'centroids', 'features')"
        )
    return found


def check_neighbours(k: int, temperature: float) -> None:
    """Check the options of a predictor that weighs its k nearest.

    Raises:
        ValueError: k below 1, or a temperature that is not positive.
    """
    if k < 1 or temperature <= 0:
        raise ValueError(f"k must be at least 1 and temperature positive, got k={k}, temperature={temperature}")


def answered(model: ModelState, f_BD: Tensor, bare_BD: Tensor) -> Tensor:
    """Logits [B, C] of the linear head on the adapted features; without such a head, scores of the classes' keys.

    Args:
        model: some strategies (SimpleCIL, RanPAC) train no linear head of all classes.
        f_BD: features under the chosen adapters.
        bare_BD: features under the bare backbone.
    """
    classes = len(model.classes)
    if model.head.num_classes == classes:
        logits_BC: Tensor = model.head(f_BD)
        return logits_BC
    return keys_of(model).class_scores(bare_BD, classes)
