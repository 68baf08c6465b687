"""The errors that users meet. Each message says what was wrong, what was expected and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class ClAdaptersError(Exception):
    """Base of every error that this package raises on purpose."""


class UnknownName(ClAdaptersError, ValueError):
    """A name that no registry entry, option or label has."""

    @classmethod
    def of(cls, kind: str, name: str, known: Iterable[str]) -> UnknownName:
        """Build the message "unknown KIND 'name'; did you mean ...? Known: ..."."""
        known = sorted(known)
        return cls(f"unknown {kind} {name!r}{suggestion(name, known)} Known: {', '.join(known) or 'none'}")


class ConfigError(ClAdaptersError, ValueError):
    """A configuration value of the wrong name, type or range."""


class DataError(ClAdaptersError, ValueError):
    """Training or test data that cannot be used: empty tasks, corrupt files, repeated classes."""


class IncompatibleBackbone(ClAdaptersError, ValueError):
    """A backbone without the sites that are needed, or not the one that the adapters were trained on."""


class BackboneUnavailable(ClAdaptersError, OSError):
    """Backbone weights that cannot be had here: no network, no such file."""


class TrainingDiverged(ClAdaptersError, ArithmeticError):
    """The loss is not a finite number."""


class StorageError(ClAdaptersError, OSError):
    """A saved model or run that is missing, altered, of a newer schema, or cannot be written."""


class PoolError(StorageError, ValueError):
    """A pool, or one adapter in it, that is damaged or not what it says, or that cannot be changed as asked."""


def suggestion(name: str, known: Iterable[str]) -> str:
    """Return "; did you mean 'x'?" for the nearest known name, else a full stop."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f"; did you mean {near[0]!r}?" if near else "."
