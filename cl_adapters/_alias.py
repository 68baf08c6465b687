"""The short names ``strategies`` and ``benchmarks``, which exist only in a checkout's root.

There the folders lie on the import path, and without this file ``import strategies`` would run every module a
second time under another name: two copies of each class, of which ``isinstance`` knows one.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Sequence
from importlib.abc import InspectLoader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import CodeType, ModuleType


def alias(short: str, long: str, file: str) -> None:
    """Make the package ``short``, whose ``__init__`` is running, the very same module object as ``long``.

    Args:
        short: the name under which ``file`` is being imported.
        long: the package's one real name.
        file: ``__file__`` of the running ``__init__``.

    Raises:
        ImportError: ``long`` is another copy of the files, so that the two cannot be one module.
    """
    module = importlib.import_module(long)
    real = module.__file__ or ""
    if not os.path.samefile(real, file):
        raise ImportError(
            f"cannot import {file} as {short!r}: the cl_adapters in use is another copy, {real}. "
            f"Import it as {long!r}, or run from the folder of the copy that you mean.",
            name=short,
            path=file,
        )
    sys.modules[short] = module  # the import system returns what stands here when the __init__ has run
    sys.meta_path.insert(0, _AliasFinder(short, long))


class _AliasFinder(MetaPathFinder):
    """Finds ``short.x`` by importing ``long.x``."""

    def __init__(self, short: str, long: str) -> None:
        self._short = short
        self._long = long

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if not fullname.startswith(f"{self._short}."):
            return None
        found = importlib.util.find_spec(self._long + fullname.removeprefix(self._short))
        if found is None:
            return None
        spec = ModuleSpec(fullname, AliasLoader(found), origin=found.origin)
        spec.submodule_search_locations = found.submodule_search_locations
        return spec


class AliasLoader(InspectLoader):
    """Loads the real module and puts it in the place of the empty one that the import system made."""

    def __init__(self, found: ModuleSpec) -> None:
        self.found = found

    def exec_module(self, module: ModuleType) -> None:
        # The real module keeps its own name and __spec__: only the entry in sys.modules is ours.
        sys.modules[module.__name__] = importlib.import_module(self.found.name)

    def get_code(self, fullname: str) -> CodeType | None:
        """Code for ``python -m short.x``."""
        loader = self.found.loader
        return loader.get_code(self.found.name) if isinstance(loader, InspectLoader) else None

    def get_source(self, fullname: str) -> str | None:
        loader = self.found.loader
        return loader.get_source(self.found.name) if isinstance(loader, InspectLoader) else None
