"""Continual learning with adapters on frozen pre-trained transformers.

The names below are the core and need no Avalanche; strategies for Avalanche are in ``cl_adapters.strategies``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from cl_adapters._lazy import lazy_names
from cl_adapters._renamed import install

if TYPE_CHECKING:
    from cl_adapters._version import __version__
    from cl_adapters.adapters.bottleneck import Bottleneck
    from cl_adapters.backbones.frozen import FrozenBackbone
    from cl_adapters.bank.bank import AdapterBank, Route
    from cl_adapters.errors import ClAdaptersError
    from cl_adapters.index.index import AdapterIndex
    from cl_adapters.language.model import LanguageModel
    from cl_adapters.model.facade import AdapterModel
    from cl_adapters.pool.pool import AdapterPool
    from cl_adapters.predictors.base import Prediction

__all__ = [
    "AdapterBank",
    "AdapterIndex",
    "AdapterModel",
    "AdapterPool",
    "Bottleneck",
    "ClAdaptersError",
    "FrozenBackbone",
    "LanguageModel",
    "Prediction",
    "Route",
    "__version__",
]

if not TYPE_CHECKING:
    __getattr__, __dir__ = lazy_names(
        __name__,
        {
            "AdapterBank": "bank",
            "AdapterIndex": "index.index",
            "AdapterModel": "model.facade",
            "AdapterPool": "pool.pool",
            "Bottleneck": "adapters.bottleneck",
            "ClAdaptersError": "errors",
            "FrozenBackbone": "backbones.frozen",
            "LanguageModel": "language.model",
            "Prediction": "predictors.base",
            "Route": "bank",
            "__version__": "_version",
        },
    )

install()
