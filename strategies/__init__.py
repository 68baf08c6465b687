"""Continual-learning strategies for Avalanche; each is imported (and Avalanche with it, seconds) on first use.

A file of this folder that registers a strategy makes its class a name of this package: there is no list to edit.
``AdaptedNet`` is no strategy, but what Avalanche's own strategies train; it needs no Avalanche.
``own_class_accuracy_metrics`` measures training for Avalanche's evaluator.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cl_adapters._lazy import lazy_names

if TYPE_CHECKING:  # what a type checker cannot find by reading files; a name that is missing here is Any to it
    from cl_adapters.strategies.adapted_net import AdaptedNet as AdaptedNet
    from cl_adapters.strategies.aper import APER as APER
    from cl_adapters.strategies.joint import Joint as Joint
    from cl_adapters.strategies.lae import LAE as LAE
    from cl_adapters.strategies.mos import MOS as MOS
    from cl_adapters.strategies.own_class_accuracy import own_class_accuracy_metrics as own_class_accuracy_metrics
    from cl_adapters.strategies.ranpac import RanPAC as RanPAC
    from cl_adapters.strategies.sema import SEMA as SEMA
    from cl_adapters.strategies.sequential import Sequential as Sequential
    from cl_adapters.strategies.simple_cil import SimpleCIL as SimpleCIL

    def __getattr__(name: str) -> Any: ...

else:
    _REGISTERED = re.compile(r"^@strategies\.register\(.*\)\nclass (\w+)", re.M)  # read, since importing takes seconds
    _OTHERS = {"AdaptedNet": "adapted_net", "own_class_accuracy_metrics": "own_class_accuracy"}
    _FOUND = _OTHERS | {
        name: file.stem
        for file in sorted(Path(__file__).parent.glob("[!_]*.py"))
        for name in _REGISTERED.findall(file.read_text(encoding="utf-8"))
    }
    __all__ = sorted(_FOUND)
    __getattr__, __dir__ = lazy_names("cl_adapters.strategies", _FOUND)

if __name__ != "cl_adapters.strategies":  # imported by its short name from a checkout's root
    from cl_adapters._alias import alias

    alias(__name__, "cl_adapters.strategies", __file__)
