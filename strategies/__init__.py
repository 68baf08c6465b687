"""Continual-learning strategies for Avalanche; each is imported (and Avalanche with it, seconds) on first use."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cl_adapters._lazy import lazy_names

if TYPE_CHECKING:
    from cl_adapters.strategies.joint import Joint
    from cl_adapters.strategies.lae import LAE
    from cl_adapters.strategies.mos import MOS
    from cl_adapters.strategies.ranpac import RanPAC
    from cl_adapters.strategies.sema import SEMA
    from cl_adapters.strategies.sequential import Sequential
    from cl_adapters.strategies.simple_cil import SimpleCIL

__all__ = ["LAE", "MOS", "SEMA", "Joint", "RanPAC", "Sequential", "SimpleCIL"]

if not TYPE_CHECKING:
    __getattr__, __dir__ = lazy_names(
        "cl_adapters.strategies",
        {
            "Joint": "joint",
            "LAE": "lae",
            "MOS": "mos",
            "RanPAC": "ranpac",
            "SEMA": "sema",
            "Sequential": "sequential",
            "SimpleCIL": "simple_cil",
        },
    )

if __name__ != "cl_adapters.strategies":  # imported by its short name from a checkout's root
    from cl_adapters._alias import alias

    alias(__name__, "cl_adapters.strategies", __file__)
