"""What is learned: tasks of prompts with answers."""

from __future__ import annotations

from dataclasses import dataclass

from cl_adapters.errors import DataError


@dataclass(frozen=True, kw_only=True)
class Example:
    """A prompt and its answer.

    Attributes:
        prompt: as the model sees it, instruction included.
        answer: what it should answer.
        choices: the label strings among which an answer can be chosen by likelihood; empty where there are none.
    """

    prompt: str
    answer: str
    choices: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.prompt.strip() or not self.answer.strip():
            raise DataError("prompt and answer must not be empty")
        if self.choices and self.answer not in self.choices:
            raise DataError(f"the answer {self.answer!r} is none of the choices {list(self.choices)}")


@dataclass(frozen=True, kw_only=True)
class InstructTask:
    """One task; its name is unlike that of any other."""

    name: str
    train: tuple[Example, ...]
    test: tuple[Example, ...]

    def __post_init__(self) -> None:
        for split, examples in (("train", self.train), ("test", self.test)):
            if not examples:
                raise DataError(f"task {self.name!r} has no examples to {split}")

    @property
    def has_choices(self) -> bool:
        """Whether every test example has label strings."""
        return all(example.choices for example in self.test)
