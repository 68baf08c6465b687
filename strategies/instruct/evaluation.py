"""Exact match: by likelihood over label strings, and by generation. Changes no state."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cl_adapters.errors import ConfigError
from cl_adapters.language.model import LanguageModel
from cl_adapters.strategies.instruct.base import InstructMethod
from cl_adapters.strategies.instruct.tasks import Example, InstructTask


@dataclass(frozen=True)
class Scores:
    """Percent of exact matches on the test examples of tasks.

    Attributes:
        likelihood: of the likeliest label string; None for a task without such.
        generation: of the generated answer.
    """

    likelihood: tuple[float | None, ...]
    generation: tuple[float, ...]


def check_answers(language: LanguageModel, tasks: Sequence[InstructTask], max_new_tokens: int) -> None:
    """Check that every right answer can be generated: one that is cut never matches.

    Raises:
        ConfigError: some have more tokens; says how many.
        DataError: an answer that leaves no room for a prompt.
    """
    for task in tasks:
        lengths = [len(answer) for answer in _answers(language, task.test)]
        longest = max(lengths)
        if longest > max_new_tokens:
            count = sum(length > max_new_tokens for length in lengths)
            raise ConfigError(
                f"{count} of {len(lengths)} test answers of task {task.name!r} have more than "
                f"max_new_tokens={max_new_tokens} tokens, up to {longest}; cut, they could never match: set "
                f"max_new_tokens={longest} or more"
            )


def evaluate(method: InstructMethod, tasks: Sequence[InstructTask]) -> Scores:
    """Judge a method by the test examples of these tasks; nobody tells it of which task a prompt is.

    But label strings say something of it: the likeliest is chosen among those of the example, as a rule those of its
    task. Only the generated answer is found without them.
    """
    return Scores(
        tuple(_likelihood(method, task) for task in tasks),
        tuple(_generation(method, task) for task in tasks),
    )


def _likelihood(method: InstructMethod, task: InstructTask) -> float | None:
    if not task.has_choices:
        return None
    prompts = [example.prompt for example in task.test]
    chosen = method.language.choose(
        prompts,
        [example.choices for example in task.test],
        method.routes(prompts),
        batch=method.config.eval_batch,
    )
    return _percent([example.answer == answer for example, answer in zip(task.test, chosen, strict=True)])


def _generation(method: InstructMethod, task: InstructTask) -> float:
    prompts = [example.prompt for example in task.test]
    written = method.language.generate(
        prompts, method.config.max_new_tokens, method.routes(prompts), batch=method.config.eval_batch
    )
    right = expected(method.language, task.test)
    return _percent([one == other for one, other in zip(written, right, strict=True)])


def expected(language: LanguageModel, examples: Sequence[Example]) -> list[str]:
    """The answers as the tokenizer gives them back: some write in lower case, or put spaces elsewhere."""
    return [language.tokens.text(answer) for answer in _answers(language, examples)]


def _answers(language: LanguageModel, examples: Sequence[Example]) -> list[list[int]]:
    """The tokens of the answers behind their prompts."""
    prompts, answers = [example.prompt for example in examples], [example.answer for example in examples]
    return [answer for _, answer in language.tokens.pairs(prompts, answers, end=False)]


def _percent(right: Sequence[bool]) -> float:
    return 100 * sum(right) / len(right)
