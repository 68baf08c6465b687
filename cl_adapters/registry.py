"""One registry for every kind of plug-in: found by scanning a package and an entry-point group.

Adding a plug-in is one new file in the scanned package (or one entry point in another distribution);
no list anywhere has to be edited.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import pkgutil
from collections.abc import Callable
from typing import Generic, TypeVar

from cl_adapters.errors import ClAdaptersError, UnknownName

T = TypeVar("T")


class Registry(Generic[T]):
    """Names to plug-ins of one kind.

    Args:
        kind: what an entry is, for messages ("adapter type", "strategy", ...).
        package: the package whose modules are imported on the first look-up; each registers itself. Names that begin
            with an underscore are left out: helpers of the package.
        group: the group of entry points of other distributions; a public name, which stays when the package moves.
    """

    def __init__(self, kind: str, package: str, *, group: str) -> None:
        self.kind = kind
        self.package = package
        self.group = group
        self._entries: dict[str, T] = {}
        self._scanned = False

    def register(self, name: str) -> Callable[[T], T]:
        """Decorator that enters a plug-in under ``name``.

        Raises:
            ClAdaptersError: the name is taken by another object; nothing is replaced silently.
        """

        def enter(entry: T) -> T:
            taken = self._entries.get(name)
            if taken is not None and _identity(taken) != _identity(entry):
                raise ClAdaptersError(
                    f"{self.kind} {name!r} is registered twice: by {_identity(taken)} and {_identity(entry)}; "
                    "rename one of them"
                )
            self._entries[name] = entry
            return entry

        return enter

    def get(self, name: str) -> T:
        """Return the plug-in of that name.

        Raises:
            UnknownName: with the nearest name and the full list.
        """
        if name not in self._entries:
            self._scan()
        if name not in self._entries:
            raise UnknownName.of(self.kind, name, self._entries)
        return self._entries[name]

    def names(self) -> list[str]:
        """All names, sorted."""
        self._scan()
        return sorted(self._entries)

    def name_of(self, entry: object) -> str:
        """Return the name under which ``entry`` (or its class) is registered.

        Raises:
            UnknownName: it is not registered.
        """
        candidates = (entry, type(entry))
        for name, known in self._entries.items():
            if any(known is candidate for candidate in candidates):
                return name
        raise UnknownName.of(self.kind, type(entry).__name__, self._entries)

    def _scan(self) -> None:
        if self._scanned:
            return
        package = importlib.import_module(self.package)
        for module in pkgutil.iter_modules(package.__path__):
            if not module.name.startswith("_"):
                importlib.import_module(f"{self.package}.{module.name}")
        for point in importlib.metadata.entry_points(group=self.group):
            self.register(point.name)(point.load())
        self._scanned = True


def _identity(entry: object) -> str:
    return f"{getattr(entry, '__module__', '?')}.{getattr(entry, '__qualname__', repr(entry))}"
