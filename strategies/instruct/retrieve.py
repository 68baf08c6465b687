"""Retrieve: an adapter per task, and for each prompt that of the task whose prompts look most like it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from cl_adapters.bank.routes import Routes
from cl_adapters.strategies.instruct.base import InstructMethod, check_learned, instruct_methods


@instruct_methods.register("retrieve")
class Retrieve(InstructMethod):
    """An adapter per task, never changed after it; the nearest key of the bare model's features chooses one."""

    summary: ClassVar[str] = "an adapter per task, chosen for each prompt by its nearest key"

    def grow(self, name: str, task: int) -> int:
        """A fresh adapter."""
        return self.language.add_task(name, self.generator("adapter", task))

    def routes(self, prompts: Sequence[str]) -> Routes:
        """One adapter per prompt."""
        check_learned(self.language)
        return self.language.route_of(prompts)
