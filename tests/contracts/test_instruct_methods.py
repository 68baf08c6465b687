"""What every registered method of continual instruction tuning keeps."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from cl_adapters.adapters.lora import LoRA
from cl_adapters.config import build, to_plain
from cl_adapters.errors import ClAdaptersError, DataError, PoolError
from cl_adapters.language.model import LanguageModel
from cl_adapters.model.facade import AdapterModel
from cl_adapters.strategies.instruct import Example, InstructConfig, InstructMethod, InstructTask, instruct_methods
from cl_adapters.strategies.instruct.evaluation import evaluate

MOOD = (("the film was good", "yes"), ("the film was great", "yes"), ("the film was bad", "no"), ("a dull film", "no"))
COLOUR = (("the colour of sky", "blue"), ("the colour of grass", "green"), ("the colour of fire", "red"))
PROMPTS, ANSWERS = map(list, zip(*MOOD, *COLOUR, strict=True))


@pytest.fixture(params=instruct_methods.names())
def cls(request: pytest.FixtureRequest) -> type[InstructMethod]:
    """Every registered method."""
    return instruct_methods.get(request.param)


@pytest.fixture
def make(cls: type[InstructMethod], tiny_decoder: Callable[[str], Path]) -> Callable[..., InstructMethod]:
    """Factory of new methods of that class: ``make(seed=0, **settings)``."""

    def build_method(seed: int = 0, **settings: Any) -> InstructMethod:
        config = cls.Config(**{"batch": 2, "adapter": LoRA(rank=2, dropout=0.2), **settings})
        language = LanguageModel.load(f"hf:{tiny_decoder('llama')}", adapter=config.adapter, keys=config.keys)
        return cls(language, config, seed)

    return build_method


def task(name: str, rows: tuple[tuple[str, str], ...]) -> InstructTask:
    examples = tuple(Example(prompt=prompt, answer=answer) for prompt, answer in rows)
    return InstructTask(name=name, train=examples, test=examples)


def test_has_a_summary_and_a_frozen_configuration(cls: type[InstructMethod]) -> None:
    assert cls.summary
    assert issubclass(cls.Config, InstructConfig)
    assert vars(cls.Config)["__dataclass_params__"].frozen
    assert all(field.kw_only for field in dataclasses.fields(cls.Config))
    assert build(cls.Config, to_plain(cls.Config()), "method") == cls.Config()
    assert instruct_methods.get(instruct_methods.name_of(cls)) is cls


def test_is_a_function_of_its_seed(make: Callable[..., InstructMethod]) -> None:
    found: list[dict[str, torch.Tensor]] = []
    for seed in (0, 0, 1):
        torch.manual_seed(len(found))  # the state around it is of no matter
        method = make(seed, epochs=2)
        with pytest.raises(ClAdaptersError, match="no task was learned"):
            method.routes(["a"])
        steps: list[tuple[str, int, int]] = []
        method.learn(task("mood", MOOD), functools.partial(_note, steps))
        state = torch.random.get_rng_state()
        evaluate(method, [task("mood", MOOD)])
        assert torch.equal(state, torch.random.get_rng_state())
        method.learn(task("colour", COLOUR))
        assert steps == [("train", done, 4) for done in (1, 2, 3, 4)]
        found.append(method.language.bank.state_dict())
    assert all(torch.equal(found[0][key], found[1][key]) for key in found[0])
    assert any(not torch.equal(found[0][key], found[2][key]) for key in found[0])


def _note(steps: list[tuple[str, int, int]], phase: str, done: int, total: int) -> None:
    steps.append((phase, done, total))


def test_trains_adapters_and_nothing_else(make: Callable[..., InstructMethod]) -> None:
    method = make(epochs=1)
    frozen = {key: value.clone() for key, value in method.language.lm.state_dict().items()}
    method.learn(task("mood", MOOD))
    method.learn(task("colour", COLOUR))
    assert 0 < method.trainable_parameters <= sum(value.numel() for value in method.language.bank.parameters())
    assert len(method.losses) == 1
    now = method.language.lm.state_dict()
    assert all(torch.equal(value, now[key]) for key, value in frozen.items())
    trained = [*method.language.bank.parameters(), *method.language.lm.parameters()]
    assert not any(value.requires_grad for value in trained), "frozen after the task"
    with pytest.raises(DataError, match="'mood' already"):
        method.learn(task("mood", MOOD))


def test_a_model_read_again_answers_as_the_method(make: Callable[..., InstructMethod], tmp_path: Path) -> None:
    """From a folder, and from a pool unless its adapters mean nothing one by one: that is refused."""
    method = make(epochs=3, lr=0.02)
    method.learn(task("mood", MOOD))
    method.learn(task("colour", COLOUR))
    model = method.language.model
    expected = method.language.log_likelihood(PROMPTS, ANSWERS, method.routes(PROMPTS))
    model.save(tmp_path / "model")
    read = [AdapterModel.load(tmp_path / "model")]
    if model.predictor.by_class:
        model.save_pool(tmp_path / "pool")
        read.append(AdapterModel.from_pool(tmp_path / "pool"))
    else:
        with pytest.raises(PoolError, match=r"cannot be a pool: its answers need all its parts.*model\.save"):
            model.save_pool(tmp_path / "pool")
        assert not (tmp_path / "pool").exists()
    for again in map(LanguageModel.of, read):
        found = again.log_likelihood(PROMPTS, ANSWERS, again.route_of(PROMPTS))
        assert torch.allclose(found, expected, atol=1e-5)
        assert again.task_of(PROMPTS) == method.language.task_of(PROMPTS)
        assert [answer.name for answer in again.model.predict_texts(PROMPTS)] == again.task_of(PROMPTS)
