"""A decoder with an adapter per prompt: likelihood, choice, generation, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
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
from cl_adapters.backbones.frozen import FrozenBackbone
from cl_adapters.bank.routes import BARE, Route, summed, taken
from cl_adapters.errors import ClAdaptersError, ConfigError, DataError, IncompatibleBackbone
from cl_adapters.language.model import LanguageModel
from cl_adapters.language.tokens import joined
from cl_adapters.model.facade import AdapterModel

ADAPTERS: dict[str, AdapterType] = {
    "lora": LoRA(rank=4, targets=("query", "value", "up", "down")),
    "bottleneck": Bottleneck(bottleneck=8, scale=1.0, dropout=0.0, init_scheme="normal"),
    "prefix": Prefix(length=3),  # inside the attention: every token is computed from the whole text
}
PROMPTS = ["what is the colour of the sky :", "the film was dull label :", "count", "the number after one is two :"]
ANSWERS = ["blue", "bad bad", "one two three", "three"]
SLOTS = [0, 1, 2, BARE]

Make = Callable[..., LanguageModel]


@pytest.fixture(scope="module")
def make(tiny_decoder: Callable[[str], Path]) -> Make:
    """A decoder with three random adapters; each is made once."""
    made: dict[tuple[str, str], LanguageModel] = {}

    def build(kind: str, adapter: str = "lora") -> LanguageModel:
        if (kind, adapter) not in made:
            language = LanguageModel.load(f"hf:{tiny_decoder(kind)}", adapter=ADAPTERS[adapter])
            for task in range(3):
                draws = generator(0, "adapter", task)
                slot = language.add_task(f"task {task}", draws)
                with torch.no_grad():
                    for value in language.bank.slot_parameters(slot):
                        value.add_(0.3 * torch.randn(value.shape, generator=draws))
                language.finish_task([PROMPTS[task], f"{PROMPTS[task]} what"], draws)
            made[kind, adapter] = language
        return made[kind, adapter]

    return build


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module", params=list(ADAPTERS))
def language(request: pytest.FixtureRequest, make: Make, kind: str) -> LanguageModel:
    return make(kind, request.param)


@pytest.fixture
def mixed() -> Route:
    return Route.hard(torch.tensor(SLOTS))


def test_the_encoder_is_the_backbones(language: LanguageModel) -> None:
    lm: Any = language.lm
    assert lm.base_model is language.model.backbone.encoder
    assert not any(value.requires_grad for value in lm.base_model.parameters())
    assert not lm.training
    loaded = FrozenBackbone.load(**language.model.backbone.source)
    assert loaded.fingerprint == language.model.backbone.fingerprint


def test_bare_likelihood_is_that_of_transformers(make: Make, kind: str, tiny_decoder: Callable[[str], Path]) -> None:
    """Against the library alone: its own model, its own logits."""
    transformers = pytest.importorskip("transformers")
    language = make(kind)
    reference = transformers.AutoModelForCausalLM.from_pretrained(tiny_decoder(kind)).eval()
    ours = language.log_likelihood(PROMPTS, ANSWERS)
    for row, (prompt, answer) in enumerate(language.tokens.pairs(PROMPTS, ANSWERS, end=False)):
        with torch.no_grad():
            log_p = reference(torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
        wanted = sum(float(log_p[len(prompt) + place - 1, token]) for place, token in enumerate(answer))
        assert float(ours[row]) == pytest.approx(wanted, abs=1e-5)
    loss = language.loss(PROMPTS, ANSWERS)
    ended = language.log_likelihood(PROMPTS, ANSWERS, end=True)
    tokens = sum(len(answer) for _, answer in language.tokens.pairs(PROMPTS, ANSWERS, end=True))
    assert float(loss) == pytest.approx(-float(ended.sum()) / tokens, abs=1e-5)
    assert torch.allclose(
        language.log_likelihood(PROMPTS, ANSWERS, normalised=True), ours / torch.tensor([1.0, 2, 3, 1]), atol=1e-6
    )


def test_mixed_adapters_equal_one_by_one(language: LanguageModel, mixed: Route) -> None:
    together = language.log_likelihood(PROMPTS, ANSWERS, mixed)
    alone = torch.cat(
        [
            language.log_likelihood([prompt], [answer], Route.single(slot))
            for prompt, answer, slot in zip(PROMPTS, ANSWERS, SLOTS, strict=True)
        ]
    )
    assert torch.allclose(together, alone, atol=1e-5)
    assert (together - language.log_likelihood(PROMPTS, ANSWERS))[:3].abs().min() > 1e-3, "the adapters do something"
    assert torch.allclose(language.log_likelihood(PROMPTS, ANSWERS, mixed, batch=3), together, atol=1e-5)


def test_padding_on_either_side_is_the_same(language: LanguageModel, mixed: Route) -> None:
    pairs = language.tokens.pairs(PROMPTS, ANSWERS, end=True)
    right, left = joined(pairs), joined(pairs, left=True)
    assert int(right.tokens_BN[2, 0]) >= 0 and int(left.tokens_BN[2, 0]) < 0
    for routes in (None, mixed, summed([0, 2], len(PROMPTS))):
        one, other = (language.answer_log_p(batch, routes)[0].sum(1) for batch in (right, left))
        assert torch.allclose(one, other, atol=1e-5)


@pytest.mark.parametrize("beams", [1, 3])
def test_generation_keeps_each_rows_adapter(language: LanguageModel, mixed: Route, beams: int) -> None:
    together = language.generate(PROMPTS, 8, mixed, num_beams=beams)
    alone = [
        language.generate([prompt], 8, Route.single(slot), num_beams=beams)[0]
        for prompt, slot in zip(PROMPTS, SLOTS, strict=True)
    ]
    assert together == alone
    assert together == language.generate(PROMPTS, 8, mixed, num_beams=beams, batch=3)
    assert together[:3] != language.generate(PROMPTS, 8, num_beams=beams)[:3], "the adapters do something"


def test_greedy_generation_is_the_likeliest_next_token(language: LanguageModel, mixed: Route) -> None:
    """Token by token, without any cache: each continuation is judged as an answer."""
    written = language.generate(PROMPTS, 4, mixed)
    words = language.tokens.preprocessing.tool.convert_ids_to_tokens(range(len(language.tokens.preprocessing.tool)))
    for row, (prompt, slot) in enumerate(zip(PROMPTS, SLOTS, strict=True)):
        ids = language.tokens.prompts([prompt], 4)[0]
        found: list[int] = []
        while len(found) < 4 and not set(found) & set(language.tokens.end):
            steps = [(ids + found, [token]) for token in range(len(words))]
            log_p, _ = language.answer_log_p(joined(steps), Route.single(slot))
            found.append(int(log_p.sum(1).argmax()))
        assert written[row] == language.tokens.text(found)


def test_attention_adapters_and_routers_compute_without_cache(make: Make) -> None:
    """A route from the text sees the whole of it in every step."""
    language = make("llama")
    widths: list[int] = []

    def router(x_BND: Tensor) -> Tensor:
        widths.append(x_BND.shape[1])
        return torch.full((len(x_BND), 2), 0.5)

    routed = language.generate(PROMPTS, 3, Route.mixed((0, 1), router))
    assert set(widths) == {1}, "the mean over the tokens, padding left out"
    half = Route((0, 1), weights_BU=torch.full((len(PROMPTS), 2), 0.5))
    assert routed == language.generate(PROMPTS, 3, half)


def test_choose_is_the_likeliest_answer(language: LanguageModel, mixed: Route) -> None:
    choices = ["blue", "bad", "one two", "three", "red"]
    scores = torch.stack(
        [language.log_likelihood(PROMPTS, [choice] * len(PROMPTS), mixed, end=True) for choice in choices], dim=1
    )
    wanted = [choices[best] for best in scores.argmax(1).tolist()]
    assert language.choose(PROMPTS, choices, mixed) == wanted
    own = [choices, choices[:2], ["red"], choices[::-1]]
    chosen = language.choose(PROMPTS, own, mixed, batch=5)
    assert chosen[0] == wanted[0] and chosen[2] == "red" and chosen[3] == wanted[3]
    assert chosen[1] == choices[int(scores[1, :2].argmax())]


def test_retrieval_by_key(language: LanguageModel) -> None:
    assert language.task_of(PROMPTS[:3]) == ["task 0", "task 1", "task 2"] == language.tasks
    route = language.route_of([PROMPTS[2], PROMPTS[0]])
    assert route.index_B is not None
    assert [route.slots[place] for place in route.index_B.tolist()] == [2, 0]
    assert [answer.name for answer in language.model.predict_texts(PROMPTS[:3])] == language.tasks


def test_the_front_of_a_long_prompt_is_cut(make: Make, kind: str) -> None:
    language = make(kind)
    long = " ".join(["red"] * 80)
    ((prompt, answer),) = language.tokens.pairs([f"{long} the sky is"], ["blue"], end=True)
    limit = language.tokens.preprocessing.max_length
    assert len(prompt) + len(answer) == limit == 64
    tool = language.tokens.preprocessing.tool
    assert tool.decode(prompt[-3:]) == "the sky is"
    assert (prompt[0] == tool.bos_token_id) == (kind == "llama")
    assert len(language.generate([f"{long} what"], 10)) == 1
    with pytest.raises(DataError, match="leave no room"):
        language.generate(["what"], 64)


def test_generation_ends_at_the_end_token(make: Make) -> None:
    tokens = make("gpt2").tokens
    assert tokens.end == [3]
    assert tokens.text([10, 11, 3, 12]) == tokens.text([10, 11])


def test_evaluation_changes_nothing(language: LanguageModel, mixed: Route) -> None:
    before = {key: value.clone() for key, value in language.state_dict().items()}
    state = torch.random.get_rng_state()
    language.log_likelihood(PROMPTS, ANSWERS, mixed)
    language.generate(PROMPTS, 3, mixed)
    after = language.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    assert torch.equal(state, torch.random.get_rng_state())
    assert language.model.backbone.token_mask is None
    assert not language.model.backbone.encoder._forward_pre_hooks


def test_only_the_routed_adapter_gets_a_gradient(make: Make) -> None:
    language = make("llama", "bottleneck")
    language.bank.requires_grad_(True)
    try:
        language.loss(PROMPTS, ANSWERS, Route.single(1)).backward()
        touched = [[value.grad is not None for value in language.bank.slot_parameters(slot)] for slot in range(3)]
        assert all(touched[1]) and not any(touched[0]) and not any(touched[2])
        assert all(value.grad is None for value in language.lm.parameters() if not value.requires_grad)
    finally:
        for slot in range(3):
            language.bank.freeze(slot)


def test_taken_rows(mixed: Route) -> None:
    rows = torch.tensor([3, 0, 0])
    route = taken({"site": mixed}, rows)
    assert isinstance(route, dict) and route["site"].index_B is not None and mixed.index_B is not None
    assert torch.equal(route["site"].index_B, mixed.index_B[rows])
    assert taken(None, rows) is None and taken(Route.single(2), rows) == Route.single(2)


def test_a_batch_is_a_whole_number_from_one_on(make: Make) -> None:
    language = make("gpt2")
    for batch in (-1, 0, 1.5):
        runs: tuple[Callable[[Any], Any], ...] = (
            lambda size: language.generate(["what"], 2, batch=size),
            lambda size: language.log_likelihood(["what"], ["blue"], batch=size),
            lambda size: language.choose(["what"], ["blue", "red"], batch=size),
            lambda size: language.features(["what"], size),
            lambda size: language.model.predict_texts(["what"], size),
        )
        for run in runs:
            with pytest.raises(ConfigError, match=rf"batch has to be a whole number, at least 1; got {batch}"):
                run(batch)


def test_refusals(make: Make, mixed: Route, tiny_decoder: Callable[[str], Path], tmp_path: Path) -> None:
    language = make("gpt2")
    with pytest.raises(ClAdaptersError, match="the route has 4 samples, but there are 2 prompts"):
        language.generate(PROMPTS[:2], 2, mixed)
    with pytest.raises(DataError, match="2 prompts but 1 answers"):
        language.log_likelihood(PROMPTS[:2], ["blue"])
    with pytest.raises(DataError, match="becomes no token"):
        language.loss(["what"], [" "])
    with pytest.raises(DataError, match="put it into a list"):
        language.generate("what")
    with pytest.raises(DataError, match="at least one choice"):
        language.choose(["what"], [[]])
    with pytest.raises(ConfigError, match="must be at least 1"):
        language.generate(["what"], 0)
    with pytest.raises(DataError, match="already"):
        language.add_task("task 1")
    with pytest.raises(ConfigError, match="hf:"):
        LanguageModel.of(AdapterModel(FrozenBackbone.load("vit_glyph_tiny")))
    headless = tmp_path / "headless"
    FrozenBackbone.load(f"hf:{tiny_decoder('llama')}").encoder.save_pretrained(headless)  # type: ignore[operator]
    language.tokens.preprocessing.tool.save_pretrained(headless)
    with pytest.raises(IncompatibleBackbone, match="head"):
        LanguageModel.load(f"hf:{headless}")
