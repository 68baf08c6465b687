"""LAE: the ensemble of its experts (released main.py:226-240), and the adapters and backbones that it works with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cl_adapters.adapters import adapters
from cl_adapters.errors import ConfigError, IncompatibleBackbone
from cl_adapters.predictors.fixed import Fixed
from cl_adapters.predictors.max_ensemble import MaxEnsemble
from cl_adapters.strategies.lae import LAE

Make = Callable[..., LAE]


# --- ensemble --------------------------------------------------------------------------------------------------------


class TwoExperts:
    """Features that are the logits wanted under each slot; the head hands them on."""

    def __init__(self, z_SBC: Tensor) -> None:
        self.z_SBC = z_SBC
        self.batch = z_SBC.shape[1]
        self.passes_B = torch.zeros(self.batch, dtype=torch.long)

    def under(self, slot: int) -> Tensor:
        self.passes_B += 1
        return self.z_SBC[slot]


def test_ensemble_is_the_maximum_of_the_probabilities() -> None:
    """Hand-made logits where the mean of the probabilities, and the maximum of the logits, answer otherwise."""
    z = torch.tensor(
        [
            # class 0 has 0.70 online; class 1 has 0.30 and 0.52: the mean (0.41) would prefer it to class 0 (0.355)
            [[0.70, 0.295, 0.005], [0.2, 0.3, 0.5]],
            [[0.01, 0.53, 0.46], [0.2, 0.7, 0.1]],
        ]
    ).log()
    z[1] += 3  # logits of the offline expert are larger everywhere; probabilities do not notice
    p = z.softmax(2)
    model: Any = type("Model", (), {"head": nn.Identity()})
    features: Any = TwoExperts(z)
    answer = MaxEnsemble().predict(model, features)
    wanted = torch.tensor([[0.70, 0.53, 0.46], [0.2, 0.7, 0.5]])
    assert torch.allclose(answer.logits.exp(), wanted, atol=1e-6)
    assert answer.logits.argmax(1).tolist() == [0, 1]
    assert p.mean(0).argmax(1).tolist() == [1, 1]
    assert z.amax(0).argmax(1).tolist() == [1, 1]
    assert answer.adapter.tolist() == [0, 1], "which expert gave the winning entry"
    assert answer.passes.tolist() == [2, 2]
    turned = MaxEnsemble(slots=(1, 0)).predict(model, TwoExperts(z))  # type: ignore[arg-type]
    assert torch.equal(turned.logits, answer.logits)
    assert turned.adapter.tolist() == [0, 1]


def test_certain_experts_stay_finite() -> None:
    z = torch.tensor([[[500.0, 0.0, -500.0]], [[0.0, 400.0, -300.0]]])
    model: Any = type("Model", (), {"head": nn.Identity()})
    answer = MaxEnsemble().predict(model, TwoExperts(z))  # type: ignore[arg-type]
    assert answer.logits.isfinite().all()
    assert answer.logits[0, 2] == -700.0


def test_predictors_and_passes(make_lae: Make, three_tasks: list[Any]) -> None:
    """One expert after task 0, two from task 1 on, also while it trains; the answer is that of both experts."""
    strategy = make_lae(train_epochs=2, decay=0.5)
    x = torch.randn(6, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    strategy.train(three_tasks[0])
    assert strategy.model.predictor == Fixed(slot=0)
    assert strategy.model.answer(x).passes.tolist() == [1] * 6
    strategy.train(three_tasks[1])
    assert strategy.model.predictor == strategy.predictor(1, True) == MaxEnsemble(slots=(0, 1))
    answer = strategy.model.answer(x)
    assert answer.passes.tolist() == [2] * 6
    p = []
    for slot in (0, 1):
        strategy.model.predictor = Fixed(slot=slot)
        p.append(strategy.model.predict(x).softmax(1))
    assert (p[0] - p[1]).abs().max() > 1e-4, "the experts differ"
    assert torch.allclose(answer.logits.exp(), torch.maximum(*p), atol=1e-6)
    assert strategy.model.task_of_slot == [0, 1]


# --- adapters and backbones ------------------------------------------------------------------------------------------


def _backbone(kind: str) -> nn.Module:
    """Random backbones of three families; features float32 [B, D]."""
    import timm

    options: dict[str, Any]
    if kind == "vit":
        kind = "vit_tiny_patch16_224"
        options = {"embed_dim": 16, "depth": 2, "num_heads": 2, "patch_size": 8, "img_size": 16}
    elif kind == "swin":
        kind = "swin_tiny_patch4_window7_224"
        options = {"embed_dim": 8, "depths": (2, 2), "num_heads": (2, 2), "img_size": 16, "patch_size": 2}
        options["window_size"] = 4
    else:
        kind = "convnext_tiny"
        options = {"depths": (1, 2, 1, 1), "dims": (8, 12, 16, 16), "patch_size": 1}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: nn.Module = timm.create_model(kind, pretrained=False, num_classes=0, **options)
    return model


@pytest.mark.parametrize("kind", ["vit", "swin", "convnext"])
@pytest.mark.parametrize("name", adapters.names())
def test_every_adapter_type_on_every_family(name: str, kind: str, make_lae: Make, three_tasks: list[Any]) -> None:
    """Trains, accumulates and answers with both; a type without sites says so before any training."""
    options = {"adapter": {"type": name}, "model": _backbone(kind), "train_epochs": 2}
    if kind in EXCEPTIONS.get(name, ()):
        with pytest.raises(IncompatibleBackbone, match=r"has no sites of kind|needs feature maps"):
            make_lae(**options)
        return
    strategy = make_lae(**options)
    bank = strategy.model.bank
    assert bank is not None
    before: dict[str, Tensor] = {}
    for experience in three_tasks[:2]:
        strategy.train(experience)
        after = bank.export(0)
        assert after.keys() == bank.export(bank.num_slots - 1).keys()
        assert any(key not in before or not torch.equal(before[key], value) for key, value in after.items())
        before = after
    assert any(not torch.equal(before[key], value) for key, value in bank.export(1).items()), "the experts differ"
    assert strategy.model.predict(torch.randn(3, 3, 16, 16)).isfinite().all()
    assert strategy.model.answer(torch.randn(3, 3, 16, 16)).passes.tolist() == [2, 2, 2]


EXCEPTIONS: dict[str, tuple[str, ...]] = {
    "bottleneck": ("convnext",),  # LAE's place is the attention
    "lora": ("convnext",),
    "prefix": ("swin", "convnext"),
    "conv_bottleneck": ("vit",),
    "ln_tuning": ("convnext",),  # one norm per block; with place="ffn" it trains there
    "pair": ("convnext",),
}
"""Which adapter types have no sites in which family."""


def test_first_blocks_follow_the_backbone(make_lae: Make) -> None:
    """As many as there are: 3 of a ViT of depth 3; counted through the stages where blocks lie in stages."""
    assert make_lae().model.bank.blocks == (0, 1, 2)
    assert make_lae(first_blocks=2).model.bank.blocks == (0, 1)
    assert make_lae(blocks=(1,)).model.bank.blocks == (1,)
    assert make_lae(model=_backbone("swin"), first_blocks=3).model.bank.blocks == (0, 1, 2)
    assert make_lae(model=_backbone("convnext"), first_blocks=4, adapter="conv_bottleneck").model.bank.blocks == (
        *range(4),
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"frozen_epochs": 6}, r"frozen_epochs must lie between 0 and train_epochs \(5\), got 6"),
        ({"frozen_epochs": -1}, "frozen_epochs"),
        ({"first_blocks": 0}, "first_blocks must be at least 1"),
        ({"decay": 1.5}, r"decay must be in \[0, 1\]"),
        ({"momentum": 1.0}, r"momentum must be in \[0, 1\)"),
    ],
)
def test_options_out_of_range(make_lae: Make, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_lae(**options)


def test_slots_of_the_ensemble() -> None:
    with pytest.raises(ValueError, match="different adapters"):
        MaxEnsemble(slots=(0, 0))
