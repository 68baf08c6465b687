"""What users give to an index, as features."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cl_adapters.backbones.encode import encode
from cl_adapters.backbones.text import TextPreprocessing
from cl_adapters.errors import DataError
from cl_adapters.index.keys import KeySource


def features_of(pool: KeySource, x: Any) -> Any:
    """Features under the bare backbone of a pool.

    Args:
        pool: loads its backbone only where it is needed.
        x: features float [B, D], which are given back; inputs of the backbone; or a list of texts.

    Returns:
        Float [B, D].

    Raises:
        DataError: texts for a backbone that takes none.
    """
    if isinstance(x, str) or (isinstance(x, (list, tuple)) and x and all(isinstance(one, str) for one in x)):
        if not isinstance(pool.backbone.preprocessing, TextPreprocessing):
            raise DataError(f"backbone {pool.backbone.name!r} takes no texts; give images or features")
        return encode(pool.backbone, [x] if isinstance(x, str) else x)
    if not isinstance(x, Mapping) and np.ndim(x) == 2 and not _whole_numbers(x):
        return x
    with torch.no_grad():
        return pool.backbone.features(x)


def _whole_numbers(x: Any) -> bool:
    """Whether these are token ids."""
    return isinstance(x, Tensor) and not x.is_floating_point()
