"""Sequential: one adapter tuned on every task in turn. The lower bound: it forgets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from cl_adapters.bank.routes import Route, Routes
from cl_adapters.strategies.instruct.base import InstructMethod, check_learned, instruct_methods


@instruct_methods.register("sequential")
class Sequential(InstructMethod):
    """One adapter for all tasks, no protection of old ones."""

    summary: ClassVar[str] = "one adapter tuned on every task in turn: the lower bound"

    def grow(self, name: str, task: int) -> int:
        """The adapter is made once."""
        self.language.add_task(name, self.generator("adapter", task) if task == 0 else None)
        return 0

    def routes(self, prompts: Sequence[str]) -> Routes:
        """The one adapter."""
        check_learned(self.language)
        return Route.single(0)
