"""Mixtures in a bank and a model: what they add, who has which share, what is saved."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from cl_adapters.adapters.bottleneck import Bottleneck
from cl_adapters.adapters.lora import LoRA
from cl_adapters.backbones.frozen import FrozenBackbone
from cl_adapters.bank.bank import AdapterBank, Route
from cl_adapters.errors import ClAdaptersError
from cl_adapters.model.facade import AdapterModel
from cl_adapters.model.heads import normal
from cl_adapters.parts import Part
from cl_adapters.parts.descriptors import Descriptors
from cl_adapters.parts.router import ExpandableRouter
from cl_adapters.predictors.mixture import MixtureOfAdapters

WIDTH = 16
ADAPTER = Bottleneck(bottleneck=4, scale=1.0, dropout=0.0)


def gen(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def x() -> Tensor:
    """Images of different tints: their pooled tokens differ."""
    return torch.randn(6, 3, 16, 16, generator=gen(1)) + 3 * torch.randn(6, 3, 1, 1, generator=gen(2))


@pytest.fixture
def backbone(tiny_vit: Callable[..., nn.Module]) -> FrozenBackbone:
    return FrozenBackbone.wrap(tiny_vit(width=WIDTH, heads=2, img_size=16, depth=3))


def add(bank: AdapterBank, blocks: tuple[int, ...] | None = None) -> int:
    """A slot of random numbers, so that it adds something, at all blocks or at some."""
    fresh = bank.fresh(gen(0), blocks)
    generator = gen(100 + bank.num_slots)
    return bank.add_slot({key: 0.3 * torch.randn(value.shape, generator=generator) for key, value in fresh.items()})


def routers(bank: AdapterBank, where: dict[int, tuple[int, ...]]) -> ExpandableRouter:
    """Routers that prefer some, but not to a hair: rows three times their usual size."""
    mixture = ExpandableRouter(dict.fromkeys(where, WIDTH))
    for block, slots in where.items():
        for slot in slots:
            for parameter in mixture.grow(block, slot, gen(10 * block + slot)):
                parameter.data *= 3
    mixture.freeze()
    return mixture


@pytest.fixture
def model(backbone: FrozenBackbone) -> AdapterModel:
    """Blocks 0-2; 1 and 2 expandable: slot 1 only at block 2, slot 2 only at block 1, slot 3 only at block 2."""
    bank = AdapterBank(backbone, ADAPTER)
    for blocks in (None, (2,), (1,), (2,)):
        add(bank, blocks)
    model = AdapterModel(backbone, bank)
    model.add_task([5, 3])
    model.head.grow(2, gen(3), normal(1.0))
    model.parts["mixture"] = routers(bank, {1: (0, 2), 2: (0, 1, 3)})
    model.parts["novelty"] = descriptors = Descriptors({1: WIDTH, 2: WIDTH}, dim=3, buffer=5)
    for block, slot, known in ((1, 0, 5), (1, 2, 4), (2, 0, 7), (2, 1, 0), (2, 3, 2)):
        descriptors.grow(block, slot, gen(slot))
        descriptors.descriptor(block, slot).records.add(torch.rand(known, generator=gen(block)))
    descriptors.freeze()
    model.predictor = MixtureOfAdapters()
    return model.eval()


def inputs_of(model: AdapterModel, x: Tensor) -> dict[str, Tensor]:
    """What the adapters of every site see in the mixture."""
    bank, mixture = parts_of(model)
    seen: dict[str, Tensor] = {}
    with torch.no_grad(), bank.route(mixture.routes(bank), watch=lambda site, x_BND: seen.update({site: x_BND})):
        model.backbone.features(x)
    return seen


def parts_of(model: AdapterModel) -> tuple[AdapterBank, ExpandableRouter]:
    assert model.bank is not None
    return model.bank, model.part("mixture", ExpandableRouter)


def test_delta_is_the_weighted_sum_of_the_adapters_outputs(model: AdapterModel, x: Tensor) -> None:
    """delta = sum_k m_k (W_up ReLU(W_down x + b_down) + b_up), in NumPy; of slots that are there."""
    bank, mixture = parts_of(model)
    block = model.backbone.encoder.get_submodule("blocks.2")
    outputs: list[Tensor] = []
    handle = block.register_forward_hook(lambda module, args, output: outputs.append(output))
    source = inputs_of(model, x)["blocks.2.ffn"]
    handle.remove()
    expected = np.zeros(source.shape)
    m_BK = mixture.weights(2, source).double().numpy()
    for k, slot in enumerate((0, 1, 3)):
        w = {key.rpartition("/")[2]: v.double().numpy() for key, v in bank.export(slot).items() if "blocks.2" in key}
        hidden = np.maximum(source.double().numpy() @ w["down"].T + w["down_bias"], 0)
        expected += m_BK[:, k, None, None] * (hidden @ w["up"].T + w["up_bias"])
    with torch.no_grad():
        plain = source + block.get_submodule("mlp")(block.get_submodule("norm2")(source))
    assert (outputs[0] - plain).double().numpy() == pytest.approx(expected, abs=2e-5)
    assert np.abs(expected).max() > 0.5
    assert m_BK.std(0).min() > 0.01, "every image has its own weights"


def test_routes_per_block(model: AdapterModel) -> None:
    bank, mixture = parts_of(model)
    routes = mixture.routes(bank)
    assert {site: route.slots for site, route in routes.items()} == {
        "blocks.0.ffn": (0,),
        "blocks.1.ffn": (0, 2),
        "blocks.2.ffn": (0, 1, 3),
    }
    assert [route.router is None for route in routes.values()] == [True, False, False]


def test_one_adapter_needs_no_router_unless_its_row_trains(backbone: FrozenBackbone, x: Tensor) -> None:
    """Then weight decay must reach the row, so it takes part; the features are the same, bit by bit."""
    bank = AdapterBank(backbone, ADAPTER)
    add(bank)
    mixture = routers(bank, {2: (0,)})
    assert all(route == Route.single(0) for route in mixture.routes(bank).values())
    model = AdapterModel(backbone, bank)
    frozen = model.features(x, mixture.routes(bank))
    rows = list(mixture.parameters())
    for row in rows:
        row.requires_grad_()
    trained = mixture.routes(bank)
    assert [route.router is not None for route in trained.values()] == [False, False, True]
    features = model.features(x, trained)
    assert torch.equal(features, frozen)
    features.square().sum().backward()
    for row in rows:
        assert row.grad is not None
        assert torch.equal(row.grad, torch.zeros_like(row))
    assert any(bool(value.grad is not None and value.grad.any()) for value in bank.slot_parameters(0))


def test_without_adapters_every_site_stays_bare(backbone: FrozenBackbone, x: Tensor) -> None:
    bank = AdapterBank(backbone, ADAPTER)
    mixture = ExpandableRouter({2: WIDTH})
    assert mixture.routes(bank) == {}
    add(bank, (0,))
    routes = mixture.routes(bank)
    assert set(routes) == {"blocks.0.ffn", "blocks.1.ffn"}
    with torch.no_grad():
        features = AdapterModel(backbone, bank).features(x, routes)
        assert torch.equal(features, AdapterModel(backbone, bank).features(x, Route.single(0)))


def test_batch_equals_one_by_one(model: AdapterModel, x: Tensor) -> None:
    whole = model.answer(x)
    alone = [model.answer(x[i : i + 1]) for i in range(len(x))]
    assert torch.allclose(whole.logits, torch.cat([answer.logits for answer in alone]), atol=1e-5)
    assert whole.adapter.tolist() == [int(answer.adapter) for answer in alone]
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    assert torch.allclose(model.answer(x[order]).logits, whole.logits[order], atol=1e-5)


def test_all_sites_of_a_block_share_its_router(backbone: FrozenBackbone, x: Tensor) -> None:
    bank = AdapterBank(backbone, LoRA())
    add(bank)
    add(bank, (2,))
    mixture = routers(bank, {2: (0, 1)})
    routes = mixture.routes(bank)
    assert {site: route.slots for site, route in routes.items()} == {
        site.name: (0, 1) if site.block == 2 else (0,) for site in bank.sites
    }
    model = AdapterModel(backbone, bank)
    model.parts["mixture"] = mixture
    seen = inputs_of(model, x)
    key, value = (site.name for site in bank.sites if site.block == 2)
    by_key, by_value = (routes[name].router for name in (key, value))
    assert by_key is not None
    m_BK = by_key(seen[key])
    assert m_BK.shape == (6, 2)
    assert torch.equal(m_BK, mixture.weights(2, seen[key]))
    assert by_value is not None
    assert torch.equal(by_value(seen[value]), m_BK), "both read the same tokens"


def test_growing_at_one_block_leaves_the_others_as_they_are(model: AdapterModel, x: Tensor) -> None:
    """A new slot at block 2 alone: blocks 0 and 1 compute the very same; block 2 mixes one more."""
    bank, mixture = parts_of(model)
    before, whole = inputs_of(model, x), model.answer(x).logits
    mixture.grow(2, add(bank, (2,)), gen(0))
    after = inputs_of(model, x)
    assert list(before) == ["blocks.0.ffn", "blocks.1.ffn", "blocks.2.ffn"]
    assert all(torch.equal(value, after[site]) for site, value in before.items())
    assert mixture.slots(1) == (0, 2)
    assert mixture.slots(2) == (0, 1, 3, 4)
    assert (model.answer(x).logits - whole).abs().max() > 1e-3


def test_prediction_names_the_largest_share_at_the_last_block(model: AdapterModel, x: Tensor) -> None:
    bank, mixture = parts_of(model)
    with torch.no_grad():
        logits = model.head(model.features(x, mixture.routes(bank)))
    answer = model.answer(x)
    assert torch.equal(answer.logits, logits)
    slots = torch.tensor(mixture.slots(2))
    assert answer.adapter.tolist() == slots[mixture.weights(2, inputs_of(model, x)["blocks.2.ffn"]).argmax(1)].tolist()
    assert len(set(answer.adapter.tolist())) > 1
    assert answer.passes.tolist() == [1] * 6


def test_prediction_runs_no_descriptor(model: AdapterModel, x: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    before = model.answer(x).logits

    def refuse(*args: object) -> Tensor:
        raise AssertionError("a descriptor was run")

    monkeypatch.setattr("cl_adapters.parts.descriptors.Descriptor.forward", refuse)
    with pytest.raises(AssertionError, match="was run"):
        model.part("novelty", Descriptors).score(2, torch.zeros(2, WIDTH))
    assert torch.equal(model.answer(x).logits, before)
    del model.parts["novelty"]
    assert torch.equal(model.answer(x).logits, before)


def test_prediction_with_a_single_adapter(backbone: FrozenBackbone, x: Tensor) -> None:
    bank = AdapterBank(backbone, ADAPTER)
    add(bank)
    model = AdapterModel(backbone, bank)
    model.add_task([0, 1])
    model.head.grow(2, gen(0))
    model.predictor = MixtureOfAdapters()
    with pytest.raises(ClAdaptersError, match="no part 'mixture' of type ExpandableRouter"):
        model.predict(x)
    model.parts["mixture"] = routers(bank, {2: (0,)})
    assert model.answer(x).adapter.tolist() == [0] * 6
    assert torch.equal(model.predict(x), model.head(model.features(x, Route.single(0))))


@pytest.mark.parametrize("name", ["mixture", "novelty"])
def test_description_and_tensors_make_an_equal_part(model: AdapterModel, name: str) -> None:
    part = model.part(name, Part)  # type: ignore[type-abstract]
    described = json.loads(json.dumps(part.description()))
    assert described == part.description()
    again = type(part).restore(described, part.tensors())
    assert again.description() == part.description()
    assert list(again.tensors()) == list(part.tensors())
    assert all(torch.equal(value, again.tensors()[key]) for key, value in part.tensors().items())
    assert not any(parameter.requires_grad for parameter in again.parameters())
    kept = {key: value.clone() for key, value in part.tensors().items()}
    for value in again.state_dict().values():
        value.fill_(7)
    assert all(torch.equal(value, part.tensors()[key]) for key, value in kept.items()), "no memory is shared"
    with pytest.raises(KeyError):
        type(part).restore(described, dict(list(kept.items())[1:]))


def test_saved_and_loaded_model_is_the_same_and_grows_alike(model: AdapterModel, x: Tensor, tmp_path: Path) -> None:
    """Records and slots included; the next expansion of both gives the same."""
    loaded = AdapterModel.load(model.save(tmp_path / "m"), model.backbone)
    assert loaded.predictor == model.predictor
    assert torch.equal(loaded.predict(x), model.predict(x))
    old, new = model.part("novelty", Descriptors), loaded.part("novelty", Descriptors)
    assert (new.blocks, new.slots(1), new.slots(2)) == ((1, 2), (0, 2), (0, 1, 3))
    assert [len(new.descriptor(2, slot).records) for slot in (0, 1, 3)] == [5, 0, 2]
    p_BD = torch.randn(4, WIDTH, generator=gen(2))
    for block in (1, 2):
        assert torch.equal(new.z(block, p_BD), old.z(block, p_BD))
    assert old.score(1, p_BD) > 0
    assert old.score(2, p_BD) == 0, "a descriptor with two records or fewer finds nothing new"
    for one in (model, loaded):
        bank, mixture = parts_of(one)
        slot = add(bank, (1,))
        mixture.grow(1, slot, gen(4))
        one.part("novelty", Descriptors).grow(1, slot, gen(5))
        for value in (torch.tensor([1.0, 2.0]), torch.tensor([3.0])):
            one.part("novelty", Descriptors).descriptor(1, slot).records.add(value)
    assert torch.equal(loaded.predict(x), model.predict(x))
    assert torch.equal(new.z(1, p_BD), old.z(1, p_BD))
    assert parts_of(loaded)[1].slots(1) == (0, 2, 4)


def test_copies_are_independent(model: AdapterModel, x: Tensor) -> None:
    before, twin = model.predict(x), copy.deepcopy(model)
    bank, mixture = parts_of(twin)
    mixture.grow(2, add(bank, (2,)), gen(0))
    twin.part("novelty", Descriptors).descriptor(2, 0).records.add(torch.ones(5))
    assert torch.equal(model.predict(x), before)
    assert (twin.predict(x) - before).abs().max() > 1e-4
    assert not torch.equal(model.part("novelty", Descriptors).descriptor(2, 0).records.values, torch.ones(5))
