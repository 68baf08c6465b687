"""One forward pass at a time through an encoder, whichever thread, model or index asks for it.

While a pass runs, the encoder's hooks read the route of that pass and keep activations between an input and an output.
A lock per encoder costs threads nothing that they had: a pass uses all of torch's threads by itself.
"""

from __future__ import annotations

import threading
from contextlib import AbstractContextManager
from weakref import WeakKeyDictionary

from torch import nn

_LOCKS: WeakKeyDictionary[nn.Module, AbstractContextManager[bool]] = WeakKeyDictionary()
_GUARD = threading.Lock()


def exclusive(encoder: nn.Module) -> AbstractContextManager[bool]:
    """The lock of an encoder, to be used in a ``with`` statement; one thread may take it several times."""
    with _GUARD:
        return _LOCKS.setdefault(encoder, threading.RLock())
