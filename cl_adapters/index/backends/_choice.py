"""Which back-end an index takes when none is named."""

from __future__ import annotations

import importlib.util
import warnings

SCANNED = 4_000_000
"""Numbers that a full scan reads in under 1 ms on one thread: 10,000 keys of width 384 in 0.6 ms, 5,000 of 768."""


def choose(keys: int, width: int) -> str:
    """Name of the back-end for so many keys.

    A full scan while it answers one query in under a millisecond; then inverted lists, which are built ten times faster
    than a graph, can lose keys, and are opened from disk without reading them. Without faiss: "exact", with a warning
    where that is slow.

    Args:
        keys: M.
        width: D.
    """
    small = keys * width <= SCANNED
    if importlib.util.find_spec("faiss") is None:
        if not small:
            warnings.warn(
                f"faiss is not installed, so {keys} keys are scanned one by one; pip install faiss-cpu", stacklevel=3
            )
        return "exact"
    return "flat" if small else "ivf"
