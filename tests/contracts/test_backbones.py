"""What a frozen backbone of every family keeps, and that adapters attach where the papers put them.

Random tiny models of timm's ViT family, and a random tiny BERT of transformers: nothing here assumes images.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cl_adapters.adapters.bottleneck import Bottleneck
from cl_adapters.backbones.frozen import FrozenBackbone
from cl_adapters.backbones.inputs import Inputs, take
from cl_adapters.backbones.preprocessing import Preprocessing
from cl_adapters.bank.bank import AdapterBank, Route
from cl_adapters.errors import ClAdaptersError
from cl_adapters.model.facade import AdapterModel
from cl_adapters.predictors.self_refine import SelfRefine


def routed(bank: AdapterBank, backbone: FrozenBackbone, x: Inputs, route: Route) -> Tensor:
    with bank.route(route):
        return backbone.features(x)


def test_features(case: Any) -> None:
    f_BD = case.backbone.features(case.inputs(3))
    assert f_BD.shape == (3, case.backbone.num_features)
    assert f_BD.isfinite().all()
    assert not f_BD.requires_grad
    assert f_BD.std() > 0.01


def test_features_do_not_depend_on_neighbours_order_or_batch_size(case: Any) -> None:
    x = case.inputs(6)
    f_BD = case.backbone.features(x)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    assert torch.allclose(case.backbone.features(take(x, order)), f_BD[order], atol=1e-5)
    assert torch.allclose(case.backbone.features(take(x, torch.tensor([2]))), f_BD[2:3], atol=1e-5)


def test_always_frozen_and_in_evaluation_mode(case: Any) -> None:
    """Also where a strategy sets its model to training: no dropout, no drop path, same bits."""
    backbone, x = case.backbone, case.inputs(3)
    before = backbone.features(x)
    AdapterModel(backbone).train()
    assert not any(module.training for module in backbone.modules())
    assert not any(p.requires_grad for p in backbone.parameters())
    assert torch.equal(backbone.features(x), before)
    backbone.check_frozen()


def test_the_models_own_weights_are_left_as_they_are(case: Any, echo_of: Any) -> None:
    """Fused qkv and all: names, order and bits of the parameters, and the features without a route."""
    backbone, x = case.backbone, case.inputs(3)
    weights = {name: value.clone() for name, value in backbone.encoder.state_dict().items()}
    plain, fingerprint = backbone.features(x), backbone.fingerprint
    bank = AdapterBank(backbone, echo_of())
    bank.add_slot(bank.fresh(torch.Generator()))
    now = backbone.encoder.state_dict()
    assert list(now) == list(weights)
    assert all(torch.equal(now[name], weights[name]) for name in weights)
    assert torch.equal(backbone.features(x), plain)
    again = FrozenBackbone.wrap(backbone.encoder, name=backbone.name)
    assert again.fingerprint == fingerprint


def test_classifier_is_left_out() -> None:
    from timm.models.vision_transformer import VisionTransformer

    sizes: dict[str, Any] = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2}
    encoder = VisionTransformer(**sizes, num_classes=7)
    x = torch.randn(2, 3, 16, 16)
    features = FrozenBackbone.wrap(encoder).features(x)
    assert features.shape == (2, 16)
    encoder.reset_classifier(0)
    assert torch.equal(encoder(x), features)


@pytest.mark.parametrize("case", ["BERT"], indirect=True)
def test_text_features_do_not_see_padding(case: Any, echo_of: Any) -> None:
    """Two more columns of padding, filled with anything, change nothing; nor do adapters see them."""
    x = case.inputs(4)
    longer = {
        "input_ids": torch.cat([x["input_ids"], torch.full((4, 2), 9)], 1),
        "attention_mask": torch.cat([x["attention_mask"], torch.zeros(4, 2, dtype=torch.long)], 1),
    }
    other = {**x, "input_ids": torch.where(x["attention_mask"] == 1, x["input_ids"], torch.tensor(17))}
    bank = AdapterBank(case.backbone, echo_of())
    bank.add_slot({key: 0.3 * value for key, value in bank.fresh(torch.Generator()).items()})
    for route in (None, Route.single(0)):
        with bank.route(route):
            plain = case.backbone.features(x)
            assert torch.allclose(case.backbone.features(longer), plain, atol=1e-6)
            assert torch.allclose(case.backbone.features(other), plain, atol=1e-6)
    mean = case.backbone.encoder(**x).last_hidden_state[0, : int(x["attention_mask"][0].sum())].mean(0)
    assert torch.allclose(case.backbone.features(x)[0], mean, atol=1e-6), "the mean over the mask"


def test_model_of_any_family_predicts(case: Any, filled: Callable[..., AdapterBank]) -> None:
    """Retrieval over three adapters, in batches of any size, saved and loaded onto the same backbone."""
    model = AdapterModel(case.backbone, filled(case.backbone, Bottleneck(bottleneck=4)))
    generator = torch.Generator().manual_seed(0)
    for labels in ([4], [2, 9], [0]):
        model.add_task(labels)
    model.head.grow(4, generator)
    model.prototypes.append(torch.randn(4, case.backbone.num_features, generator=generator))
    model.predictor = SelfRefine()
    x = case.inputs(5)
    logits = model.predict(x, batch=5)
    assert logits.shape == (5, 4)
    assert torch.allclose(model.predict(x, batch=2), logits, atol=1e-5)


def test_deepcopy_of_a_backbone_with_adapters(case: Any, filled: Callable[..., AdapterBank], echo_of: Any) -> None:
    model = AdapterModel(case.backbone, filled(case.backbone, echo_of(), slots=1))
    twin, x = copy.deepcopy(model), case.inputs(2)
    with torch.no_grad():
        for parameter in twin.bank.slot_parameters(0):  # type: ignore[union-attr]
            parameter.add_(1)
    assert not torch.allclose(model.features(x, Route.single(0)), twin.features(x, Route.single(0)))
    assert torch.equal(model.features(x, None), twin.features(x, None))


# --- fingerprint, preprocessing -----------------------------------------------------------------------------


def test_fingerprint_tells_weights_preprocessing_and_pooling_apart(tiny_vit: Callable[..., nn.Module]) -> None:
    def wrap(seed: int = 0, **options: Any) -> str:
        return FrozenBackbone.wrap(tiny_vit(seed), **options).fingerprint

    assert wrap() == wrap()
    bit = tiny_vit()
    with torch.no_grad():
        next(bit.parameters()).view(-1)[0] += 1e-6
    different = {
        wrap(),
        wrap(1),
        FrozenBackbone.wrap(bit).fingerprint,
        wrap(preprocessing=Preprocessing(input_size=(3, 32, 32))),
        wrap(preprocessing=Preprocessing(input_size=(3, 32, 32), crop_pct=1.0)),
        wrap(pooling="cls"),
    }
    assert len(different) == 6


def test_wrong_image_size_is_a_clear_error(tiny_vit: Callable[..., nn.Module]) -> None:
    backbone = FrozenBackbone.wrap(tiny_vit(), preprocessing=Preprocessing(input_size=(3, 32, 32)))
    for shape in ((2, 3, 16, 16), (2, 1, 32, 32), (3, 32, 32)):
        with pytest.raises(ClAdaptersError, match=r"takes images \[B, 3, 32, 32\], got .*eval_transform"):
            backbone.features(torch.zeros(shape))


def test_leaf_that_asks_for_a_gradient_is_named(tiny_vit: Callable[..., nn.Module]) -> None:
    backbone = FrozenBackbone.wrap(tiny_vit())
    backbone.encoder.get_parameter("pos_embed").requires_grad_(True)
    with pytest.raises(ClAdaptersError, match="'pos_embed' requires a gradient"):
        backbone.check_frozen()


@pytest.mark.parametrize("mode", ["parallel", "sequential"])
def test_every_backbone_takes_mixed_batches(case: Any, mode: Any, filled: Callable[..., AdapterBank]) -> None:
    bank = filled(case.backbone, Bottleneck(bottleneck=4, mode=mode, scale=1.0))
    inputs, ids = case.inputs(5), torch.tensor([2, 0, 1, 0, 2])
    plain = case.backbone.features(inputs)
    mixed = routed(bank, case.backbone, inputs, Route.hard(ids))
    assert (mixed - plain).abs().amax(1).min() > 1e-3
    for i, slot in enumerate(ids.tolist()):
        alone = routed(bank, case.backbone, take(inputs, torch.tensor([i])), Route.single(slot))
        assert (mixed[i] - alone[0]).abs().max() < 2e-5
    assert torch.equal(case.backbone.features(inputs), plain), "nothing is left behind by a route"


def test_every_backbone_passes_gradients_to_every_adapter(case: Any, filled: Callable[..., AdapterBank]) -> None:
    bank = filled(case.backbone, Bottleneck(bottleneck=4, scale=1.0), slots=2)
    routed(bank, case.backbone, case.inputs(4), Route.single(1)).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in bank.slot_parameters(1))
    assert all(p.grad is None for p in bank.slot_parameters(0))
    assert all(p.grad is None for p in case.backbone.parameters())
