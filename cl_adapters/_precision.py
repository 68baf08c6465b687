"""Automatic mixed precision around calls of this package: where it is left out, and how it stays right."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def uncached_autocast() -> Iterator[None]:
    """Let autocast convert weights anew at each use.

    It keeps converted weights until its outermost block ends. That is right around one forward pass; around a whole
    training every step would compute with the weights of the first, or with those that an evaluation has converted
    without gradients.
    """
    before = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(before)
        torch.clear_autocast_cache()


def full_precision(device: torch.device) -> torch.autocast:
    """A block in which products on a device are as exact as their operands, autocast or not."""
    return torch.autocast(device.type, enabled=False)
