"""What every registered predictor keeps, and that self-refined retrieval answers as if it had run every adapter."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import runpy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cl_adapters.backbones.frozen import FrozenBackbone
from cl_adapters.bank.bank import Route
from cl_adapters.config import build, to_plain
from cl_adapters.errors import ClAdaptersError, ConfigError
from cl_adapters.features import FeatureMemory
from cl_adapters.model.facade import AdapterModel
from cl_adapters.parts import Part
from cl_adapters.predictors import Predictor, predictors
from cl_adapters.predictors.nearest_prototype import NearestPrototype
from cl_adapters.predictors.self_refine import SelfRefine
from tests.models import random_model

MakeModel = Callable[..., AdapterModel]


EXAMPLES: dict[str, Callable[[AdapterModel, torch.Generator], Part]] = {
    path.stem: runpy.run_path(str(path))["example"]
    for path in sorted(Path(__file__).with_name("part_examples").glob("*.py"))
}
"""By the registered name of the part: what predictors read besides keys and heads."""


@pytest.fixture
def make_model(tiny_vit: Callable[..., nn.Module]) -> MakeModel:
    """Factory of models with T random adapters and adversarial heads: the answer to an image depends on its adapter.

    It has every part of ``part_examples``, by its registered name.
    """

    def make(tasks: int = 4, seed: int = 0, classes: tuple[int, ...] = (2, 1, 3)) -> AdapterModel:
        backbone = FrozenBackbone.wrap(tiny_vit(width=16, heads=2, img_size=16, depth=2))
        labels = itertools.count(50, -1)
        sizes = [classes[task % len(classes)] for task in range(tasks)]
        model = random_model(backbone, [list(itertools.islice(labels, size)) for size in sizes], seed=seed)
        for name, example in EXAMPLES.items():
            model.parts[name] = example(model, torch.Generator().manual_seed(seed))
        return model

    return make


@pytest.fixture(params=predictors.names())
def predictor(request: pytest.FixtureRequest) -> Predictor:
    """Every registered predictor with its defaults."""
    return predictors.get(request.param)()


@pytest.fixture
def x() -> Tensor:
    return torch.randn(12, 3, 16, 16, generator=torch.Generator().manual_seed(7))


@contextmanager
def counted(model: AdapterModel) -> Iterator[list[int]]:
    """Images that really go through the backbone, one number per call."""
    batches: list[int] = []
    handle = model.backbone.encoder.get_submodule("patch_embed").register_forward_hook(
        lambda module, args, output: batches.append(len(args[0]))
    )
    try:
        yield batches
    finally:
        handle.remove()


def test_is_a_frozen_keyword_only_dataclass_with_a_summary(predictor: Predictor) -> None:
    cls: Any = type(predictor)
    assert vars(cls)["__dataclass_params__"].frozen
    assert all(field.kw_only for field in dataclasses.fields(cls))
    assert cls.summary
    assert build(cls, to_plain(predictor)) == predictor
    assert predictors.name_of(predictor) in predictors.names()


def test_says_what_it_did(predictor: Predictor, make_model: MakeModel, x: Tensor) -> None:
    model = make_model()
    model.predictor = predictor
    with counted(model) as batches:
        answer = model.answer(x)
    assert answer.logits.shape == (12, len(model.classes))
    assert answer.logits.dtype == torch.float32
    assert answer.logits.isfinite().all()
    assert answer.adapter.dtype == torch.int64
    assert answer.passes.dtype == torch.float32
    assert answer.abstained is None, "no threshold was set"
    assert answer.adapter.shape == answer.passes.shape == (12,)
    assert ((answer.adapter >= -1) & (answer.adapter < model.num_slots)).all()
    assert answer.passes.min() >= 1
    assert int(answer.passes.sum()) == sum(batches), "the passes that were really run"
    assert answer.passes.max() <= model.num_slots + 1
    assert len(batches) <= model.num_slots + 1, "batched over the images, never image by image"


def test_changes_nothing(predictor: Predictor, make_model: MakeModel, x: Tensor) -> None:
    model = make_model()
    model.predictor = predictor
    before = copy.deepcopy(model)
    random_state = torch.get_rng_state()
    first, second = model.answer(x), model.answer(x)
    assert torch.equal(first.logits, second.logits)
    assert torch.equal(first.adapter, second.adapter)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert model.predictor == before.predictor
    assert model.classes == before.classes
    now = model.state_dict()
    assert all(torch.equal(value, now[key]) for key, value in before.state_dict().items())
    assert all(a.requires_grad == b.requires_grad for a, b in zip(model.parameters(), before.parameters(), strict=True))


def test_does_not_depend_on_batch_size_order_or_neighbours(
    predictor: Predictor, make_model: MakeModel, x: Tensor
) -> None:
    model = make_model()
    model.predictor = predictor
    whole = model.answer(x)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    shuffled = model.answer(x[order])
    assert torch.allclose(shuffled.logits, whole.logits[order], atol=1e-5)
    assert torch.equal(shuffled.adapter, whole.adapter[order])
    assert torch.equal(shuffled.passes, whole.passes[order])
    for size in (1, 5):
        assert torch.allclose(model.predict(x, batch=size), whole.logits, atol=1e-5)
        assert torch.equal(model.predict(x, batch=size).argmax(1), whole.logits.argmax(1))
    doubled = model.answer(torch.cat([x, torch.randn_like(x)]))
    assert torch.allclose(doubled.logits[:12], whole.logits, atol=1e-5)


def test_feature_memory_changes_no_answer_and_saves_passes(
    predictor: Predictor, make_model: MakeModel, x: Tensor
) -> None:
    """Three evaluations: fresh, all remembered in other batches, and after one adapter was forgotten."""
    model = make_model()
    model.predictor = predictor
    memory, numbers = FeatureMemory(model), list(range(100, 112))
    without = model.answer(x)
    with counted(model) as batches:
        first = model.answer(x, memory, numbers)
    if not predictor.remembers:
        assert len(memory) < sum(batches)
        assert sum(batches) == int(without.passes.sum())
        assert torch.equal(first.logits, without.logits)
        return
    assert sum(batches) == int(without.passes.sum()) == len(memory)
    with counted(model) as batches:
        parts = [model.answer(x[i : i + 4], memory, numbers[i : i + 4]) for i in (0, 4, 8)]
    assert not batches, "everything was known"
    for answer, logits in ((first, first.logits), (without, torch.cat([part.logits for part in parts]))):
        assert torch.allclose(logits, answer.logits, atol=1e-5)
        assert torch.equal(answer.passes, without.passes), "what a single prediction costs, remembered or not"
    known = len(memory)
    memory.forget(0)
    memory.forget(-1)
    left = len(memory)
    with counted(model) as batches:
        again = model.answer(x, memory, numbers)
    assert sum(batches) == known - left > 0
    assert len(memory) == known
    assert torch.allclose(again.logits, without.logits, atol=1e-5)


def test_memory_of_another_model_or_without_numbers(make_model: MakeModel, x: Tensor) -> None:
    model, other = make_model(), make_model(seed=1)
    with pytest.raises(ClAdaptersError, match="features of another model"):
        model.answer(x, FeatureMemory(other), range(12))
    with pytest.raises(ClAdaptersError, match="12 inputs, but no sample numbers"):
        model.answer(x, FeatureMemory(model))
    with pytest.raises(ClAdaptersError, match="12 inputs, but 11 sample numbers"):
        model.answer(x, FeatureMemory(model), range(11))


def test_a_model_that_knows_nothing(tiny_vit: Callable[..., nn.Module], predictor: Predictor) -> None:
    model = AdapterModel(FrozenBackbone.wrap(tiny_vit()))
    model.predictor = predictor
    with pytest.raises(ClAdaptersError, match="knows no class yet"):
        model.predict(torch.zeros(1, 3, 32, 32))


# --- self-refined retrieval -------------------------------------------------------------------------------------------


def all_adapters(model: AdapterModel, x: Tensor, max_steps: int = 4) -> tuple[Tensor, Tensor, list[set[int]]]:
    """The released loop, image by image, on the features under every adapter.

    Returns:
        raw z [B, C], raw o [B, C] and the adapters visited per image.
    """
    assert model.bank is not None
    with torch.no_grad():
        features = []
        for slot in range(model.num_slots):
            with model.bank.route(Route.single(slot)):
                features.append(model.backbone(x))
        prototypes = nn.functional.normalize(model.prototypes.prototypes, dim=1)
        o = nn.functional.normalize(features[0], dim=1) @ prototypes.T
        rows, visits = [], []
        for image in range(len(x)):
            i = int(model.task_of_column[int(o[image].argmax())])
            seen: set[int] = set()
            for _ in range(max_steps):
                seen.add(i)
                z = model.head.weight @ features[i][image] + model.head.bias
                j = int(model.task_of_column[int(z.argmax())])
                if j == i:
                    break
                i = j
            rows.append(z)
            visits.append(seen)
        return torch.stack(rows), o, visits


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("tasks", [1, 2, 3, 5, 8])
def test_raw_logits_of_the_version_that_runs_every_adapter(
    make_model: MakeModel, x: Tensor, tasks: int, seed: int
) -> None:
    model = make_model(tasks, seed)
    z, o, visits = all_adapters(model, x)
    for ensemble in (False, True):
        model.predictor = SelfRefine(ensemble=ensemble)
        with counted(model) as batches:
            answer = model.answer(x)
        wanted = z.softmax(1) + (tasks * o).softmax(1) if ensemble else z
        assert (answer.logits - wanted).abs().max() <= 1e-5
        assert torch.equal(answer.logits.argmax(1), wanted.argmax(1))
        cost = [1 + len(seen - {0}) for seen in visits]
        assert answer.passes.tolist() == cost
        assert max(cost) <= min(tasks, 5)
        assert sum(batches) == sum(cost)
        assert len(batches) <= 5, "one mixed batch per round"
    if tasks == 8:
        for steps in (1, 2, 3):
            other, _, _ = all_adapters(model, x, max_steps=steps)
            assert (z - other).abs().max() > 1e-2, "every step of the retrieval matters for these heads"


def test_adversarial_heads_reach_the_bound(make_model: MakeModel, x: Tensor) -> None:
    """Over many heads some image needs all 5 passes, and none needs 6."""
    worst = 0
    for seed in range(10):
        model = make_model(8, seed)
        model.predictor = SelfRefine()
        worst = max(worst, int(model.answer(x).passes.max()))
    assert worst == 5


def test_nearest_prototype_retrieves_in_one_hop(make_model: MakeModel, x: Tensor) -> None:
    model = make_model(5)
    model.predictor = NearestPrototype()
    z, o, _ = all_adapters(model, x, max_steps=1)
    answer = model.answer(x)
    assert (answer.logits - z).abs().max() <= 1e-5
    assert answer.adapter.tolist() == model.task_of_column[o.argmax(1)].tolist()
    assert answer.passes.tolist() == [1 + (slot != 0) for slot in answer.adapter.tolist()]


def test_options_out_of_range() -> None:
    with pytest.raises(ConfigError, match="max_steps must be at least 1, got 0"):
        build(SelfRefine, {"max_steps": 0})
