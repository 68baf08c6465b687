"""What a strategy says about an adapter that it added because the data asked for one."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Expansion:
    """One adapter added at one block during a task, and what made the strategy add it.

    Attributes:
        task: task (0-based) in which it was added.
        block: block (0-based from the input) that got it.
        slot: its slot in the bank.
        score: how new the data looked to this block; the block expands where it exceeds ``threshold``.
        threshold: the limit.
        scan: pass over the task's data in which it happened (0-based): each pass may find more to add.
        batch: batch of that pass (0-based).
    """

    task: int
    block: int
    slot: int
    score: float
    threshold: float
    scan: int
    batch: int
