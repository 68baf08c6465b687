"""A continually trained classifier: its state, its files, and the front door AdapterModel."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cl_adapters._lazy import lazy_names

if TYPE_CHECKING:
    from cl_adapters.model.facade import AdapterModel
    from cl_adapters.model.predict import Answer

__all__ = ["AdapterModel", "Answer"]

if not TYPE_CHECKING:
    __getattr__, __dir__ = lazy_names(__name__, {"AdapterModel": "facade", "Answer": "predict"})
