"""Origin: what an adapter was made of. Kept with the model, so that forgetting can name what cannot be undone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Origin:
    """What one adapter was made of, besides its own images.

    Attributes:
        parents: slots of the adapters that it started from or was merged with.
        merge: how, as plain JSON, such as {"method": "ema", "momentum": 0.1}; None where nothing was merged. With
            "head": "aligned" the linear head's rows of all classes were trained on samples of all classes up to then.
    """

    parents: tuple[int, ...] = ()
    merge: Mapping[str, Any] | None = None
