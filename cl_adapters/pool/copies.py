"""Copies of a pool's adapters together with the rule that predicts with them."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from cl_adapters.pool.model_card import CARD
from cl_adapters.pool.pool import AdapterPool


def copy_pool(pool: AdapterPool, folder: Path, ids: Sequence[str] | None = None) -> AdapterPool:
    """A new pool of the same backbone with these adapters, and the same predictor.

    Raises:
        UnknownName: no such adapter.
        PoolError: the folder has a pool already.
    """
    made = AdapterPool.create(folder, pool.backbone)
    pool.copy_to(made, ids)
    if (pool.path / CARD).is_file():
        shutil.copyfile(pool.path / CARD, made.path / CARD)
    return made


@contextmanager
def temporary_copy(pool: AdapterPool, ids: Sequence[str] = ()) -> Iterator[AdapterPool]:
    """:func:`copy_pool` for a while, to try a change on; without ids it has no adapters yet."""
    with tempfile.TemporaryDirectory() as folder:
        yield copy_pool(pool, Path(folder) / "pool", ids)
