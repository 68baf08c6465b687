"""A threshold on scores below which the answer is "none of these"."""

from __future__ import annotations

import math

import torch

from cl_adapters.errors import ConfigError, DataError
from cl_adapters.index.index import AdapterIndex


def calibrate(index: AdapterIndex, false_reject: float) -> float:
    """Set ``index.threshold`` from the features that were held back in training.

    An input whose best score is below the threshold is refused. For new inputs that are drawn like the held-back ones,
    the chance of that is at most ``false_reject``, whatever their law: the rank of a new score among H others is
    uniform (Vovk et al. 2005, conformal prediction).

    Args:
        index: its pool has "held_out" features in the knowledge of its records.
        false_reject: share of inputs of known classes that may be refused, in (0, 1).

    Returns:
        The threshold: the best score of one of the held-back features.

    Raises:
        ConfigError: a share outside (0, 1).
        DataError: too few held-back features for it.
    """
    if not 0 < false_reject < 1:
        raise ConfigError(f"false_reject lies between 0 and 1, got {false_reject}")
    parts = [index.pool.knowledge(id) for id in index.records]
    held = [part["held_out"] for part in parts if len(part.get("held_out", ()))]
    count = sum(map(len, held))
    rank = math.floor(false_reject * (count + 1) + 1e-9)
    if rank < 1:
        raise DataError(
            f"the pool's knowledge holds {count} held-back features; for false_reject={false_reject} at least "
            f"{math.ceil(1 / false_reject) - 1} are needed. Train with more held back, or allow more"
        )
    best_H = index.search_features(torch.cat(held), 1).scores[:, 0]
    index.threshold = float(best_H.sort().values[rank - 1])
    return index.threshold
