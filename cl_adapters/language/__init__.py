"""Language models: adapters on decoders, which answer prompts."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cl_adapters._lazy import lazy_names

if TYPE_CHECKING:
    from cl_adapters.language.model import LanguageModel

__all__ = ["LanguageModel"]

if not TYPE_CHECKING:
    __getattr__, __dir__ = lazy_names(__name__, {"LanguageModel": "model"})
