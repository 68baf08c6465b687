"""Answers to one prompt from its keys and values: the same numbers as from the whole texts, on every decoder."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cl_adapters._seeding import generator
from cl_adapters.adapters.base import AdapterType
from cl_adapters.adapters.bottleneck import Bottleneck
from cl_adapters.adapters.lora import LoRA
from cl_adapters.adapters.prefix import Prefix
from cl_adapters.bank.routes import BARE, Route, summed
from cl_adapters.language.model import LanguageModel
from tests.backbones.conftest import DECODERS

pytest.importorskip("transformers")

HEADS = {"GPT-2": "LMHeadModel"}
"""What the class of a whole model is called, where it is not ForCausalLM."""
FAMILIES = [family for family in DECODERS if family not in ("Gemma 3", "Qwen2")]
"""Gemma 3's whole model has another configuration, Qwen2's tokenizer knows no list of words."""
PROMPTS = ["the sky is not", "grass", "the grass is not blue the grass is", "red is"]
CHOICES = ["green", "not blue", "red green blue", "the sky is blue"]
LORA = LoRA(rank=4, targets=("output", "down"))


@pytest.fixture
def make(folder: Callable[..., Path]) -> Callable[..., LanguageModel]:
    """A decoder with two random adapters."""

    def build(family: str, adapter: AdapterType = LORA) -> LanguageModel:
        place = folder(family, HEADS.get(family, "ForCausalLM"))
        language = LanguageModel.load(f"hf:{place}", adapter=adapter)
        for task in range(2):
            draws = generator(0, "adapter", task)
            slot = language.add_task(f"task {task}", draws)
            with torch.no_grad():
                for value in language.bank.slot_parameters(slot):
                    value.add_(0.3 * torch.randn(value.shape, generator=draws))
            language.finish_task([PROMPTS[task]], draws)
        return language

    return build


@contextmanager
def counted(language: LanguageModel) -> Iterator[list[int]]:
    """Places of the batches that go through the encoder."""
    places: list[int] = []

    def note(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        places.append(int(kwargs["input_ids"].numel()))

    handle = language.model.backbone.encoder.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield places
    finally:
        handle.remove()


def expanded(language: LanguageModel, routes: Callable[[int], Any], prompts: list[str] = PROMPTS) -> Tensor:
    """Every prompt anew for each of its choices, alone: float32 [B * K]."""
    return torch.cat(
        [
            language.log_likelihood([prompt], [choice], routes(row), end=True)
            for row, prompt in enumerate(prompts)
            for choice in CHOICES
        ]
    )


def pairs_of(language: LanguageModel, prompts: list[str] = PROMPTS) -> tuple[Any, Tensor]:
    pairs = language.tokens.pairs([p for p in prompts for _ in CHOICES], CHOICES * len(prompts), end=True)
    return pairs, torch.arange(len(prompts)).repeat_interleave(len(CHOICES))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_as_from_whole_texts(family: str, make: Callable[..., LanguageModel]) -> None:
    """Also behind sliding windows that are shorter than a prompt, and whatever shares the batch."""
    language = make(family)
    pairs, rows = pairs_of(language)
    slots = [0, 1, BARE, 1]
    wanted = expanded(language, lambda row: Route.single(slots[row]))
    for batch in (16, 3):
        found = language._shared_scores(pairs, rows, Route.hard(torch.tensor(slots)), batch)
        assert found is not None and torch.allclose(found, wanted, atol=1e-5), batch
    shuffled = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(0))
    found = language._shared_scores([pairs[i] for i in shuffled.tolist()], rows[shuffled], Route.single(1), 5)
    assert found is not None
    assert torch.allclose(found, expanded(language, lambda row: Route.single(1))[shuffled], atol=1e-5)


@pytest.mark.parametrize("adapter", [LORA, Bottleneck(bottleneck=4, scale=1.0, init_scheme="normal")])
def test_choose_computes_a_prompt_once(adapter: AdapterType, make: Callable[..., LanguageModel]) -> None:
    language = make("Llama", adapter)
    wanted = expanded(language, lambda row: summed([0, 1], 1)).view(len(PROMPTS), -1)
    with counted(language) as places:
        chosen = language.choose(PROMPTS, CHOICES, summed([0, 1], len(PROMPTS)))
    assert chosen == [CHOICES[best] for best in wanted.argmax(1).tolist()]
    pairs, _ = pairs_of(language)
    longest = max(len(prompt) for prompt, _ in pairs[:: len(CHOICES)])
    assert places == [len(PROMPTS) * longest, len(pairs) * (max(len(answer) for _, answer in pairs) - 1)]
    lengths = torch.tensor([float(len(answer)) for _, answer in pairs]).view_as(wanted)
    means = [CHOICES[best] for best in (wanted / lengths).argmax(1).tolist()]
    assert language.choose(PROMPTS, CHOICES, summed([0, 1], len(PROMPTS)), normalised=True) == means


def test_where_nothing_can_be_shared(make: Callable[..., LanguageModel]) -> None:
    """Adapters inside the attention, routes from the text, prompts that are cut for their longest answer."""
    mixed = Route.mixed((0, 1), lambda x_BND: torch.full((len(x_BND), 2), 0.5))
    for adapter, route in ((Prefix(length=3), Route.single(1)), (LORA, mixed)):
        language = make("Llama", adapter)
        wanted = expanded(language, functools.partial(_same, route)).view(len(PROMPTS), -1)
        with counted(language) as places:
            assert language.choose(PROMPTS, CHOICES, route) == [CHOICES[best] for best in wanted.argmax(1).tolist()]
        assert len(places) == 1, "every prompt with each of its choices"
    language = make("Llama")
    long = [" ".join(["red"] * 40), "grass"]
    pairs, rows = pairs_of(language, long)
    assert language._shared_scores(pairs, rows, None, 16) is None
    wanted = expanded(language, lambda row: None, long).view(len(long), -1)
    assert language.choose(long, CHOICES) == [CHOICES[best] for best in wanted.argmax(1).tolist()]


def _same(route: Route, row: int) -> Route:
    return route
