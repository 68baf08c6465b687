"""Many readers at once, or one writer alone."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class ReadersWriter:
    """Readers run side by side; a writer waits for them and keeps new ones out. Not re-entrant.

    Readers that waited while a writer was at work come before the next writer, so neither can shut out the other.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._readers = 0
        self._writing = False
        self._waiting = 0
        self._owed = 0

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Keep writers out."""
        with self._changed:
            self._waiting += 1
            try:
                self._changed.wait_for(lambda: not self._writing)
                self._readers += 1
            finally:  # also when interrupted
                self._waiting -= 1
                self._owed = max(0, self._owed - 1)
        try:
            yield
        finally:
            with self._changed:
                self._readers -= 1
                self._changed.notify_all()

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Keep everyone else out."""
        with self._changed:
            self._changed.wait_for(lambda: not self._writing and not self._owed)
            self._writing = True
        try:
            with self._changed:
                self._changed.wait_for(lambda: not self._readers)
            yield
        finally:
            with self._changed:
                self._writing = False
                self._owed = self._waiting
                self._changed.notify_all()
