"""Randomness as a pure function of (seed, purpose): nothing has to be stored to resume a run.

Every task, every phase and every draw gets its own seed, derived from the run's seed by hashing. Code of others
that draws from global generators (data loaders, torchvision transforms) runs inside :func:`isolated`, so it
neither sees nor disturbs the user's random state, and an evaluation in between changes nothing.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def derive(seed: int, *purpose: str | int) -> int:
    """A 63-bit seed for one purpose, such as ``derive(0, "alignment", task)``."""
    text = "/".join(str(part) for part in (seed, *purpose))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def generator(seed: int, *purpose: str | int, device: torch.device | str = "cpu") -> torch.Generator:
    """A fresh generator for one purpose."""
    return torch.Generator(device).manual_seed(derive(seed, *purpose))


@contextmanager
def isolated(device: torch.device | None = None) -> Iterator[None]:
    """Put back the global random states of torch, NumPy and Python when the block ends."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    devices = [device] if device is not None and device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)


def seed_globals(seed: int) -> None:
    """Seed the global generators of torch, NumPy and Python; call it inside :func:`isolated`."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
