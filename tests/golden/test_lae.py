"""LAE: what its released code does around the training loop (main.py:56-64, 208-240; algorithms: Gao et al. 2023).

Wanted values come from NumPy recursions on weights recorded step by step, and from numbers worked out by hand.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from avalanche.core import SupervisedPlugin
from torch import Tensor, nn

from cl_adapters.adapters import adapters
from cl_adapters.backbone import FrozenBackbone
from cl_adapters.errors import ConfigError, IncompatibleBackbone
from cl_adapters.model import AdapterModel
from cl_adapters.parts.accumulation import Accumulation
from cl_adapters.predictors.fixed import Fixed
from cl_adapters.predictors.max_ensemble import MaxEnsemble
from cl_adapters.strategies.lae import LAE, LAEConfig

Make = Callable[..., LAE]


class Recorder(SupervisedPlugin):
    """Both experts after every step, and epoch by epoch what trains and at which rate."""

    def __init__(self) -> None:
        super().__init__()
        self.experts: list[tuple[dict[str, Tensor], dict[str, Tensor]]] = []
        self.online: list[dict[str, Tensor]] = []
        self.rates: list[list[float]] = []
        self.trains: list[bool] = []
        self.moments: list[tuple[int, int]] = []

    def before_training_epoch(self, strategy: Any, **kwargs: Any) -> None:
        bank = strategy.model.bank
        self.online.append(bank.export(0))
        self.rates.append([group["lr"] for group in strategy.optimizer.param_groups])
        (trains,) = {parameter.requires_grad for parameter in bank.slot_parameters(0)}
        self.trains.append(trains)

    def before_forward(self, strategy: Any, **kwargs: Any) -> None:
        if strategy.model.num_slots > 1:  # after the step before, for the first one the start
            self.experts.append((strategy.model.bank.export(0), strategy.model.bank.export(1)))

    def after_training_epoch(self, strategy: Any, **kwargs: Any) -> None:
        head, (adapter, *_) = strategy.model.head.weight, strategy.model.bank.slot_parameters(0)
        state = strategy.optimizer.state
        self.moments.append(tuple(int(state[p]["step"]) if p in state else 0 for p in (head, adapter)))  # type: ignore[arg-type]

    def after_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        self.before_forward(strategy)


@pytest.fixture
def make(tiny_vit: Callable[..., nn.Module]) -> Make:
    """Factory of LAE on a ViT of width 16 and depth 3; 12 images in batches of 4 are 3 steps an epoch."""

    def build(**options: Any) -> LAE:
        values: dict[str, Any] = {"train_mb_size": 4, "train_epochs": 5, "lr": 0.01, "decay": 0.9}
        model = options.pop("model", None) or tiny_vit(width=16, heads=2, img_size=16)
        return LAE(model=model, evaluator=None, seed=3, **(values | options))

    return build


def recorded(strategy: LAE, experience: Any) -> Recorder:
    """Train one experience under a recorder."""
    recorder = Recorder()
    strategy.plugins.append(recorder)
    strategy.train(experience)
    strategy.plugins.remove(recorder)
    return recorder


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Bit for bit."""
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


# --- learning --------------------------------------------------------------------------------------------------------


def test_defaults_are_those_of_the_released_cifar_configuration() -> None:
    config = LAEConfig()
    assert (config.lr, config.train_mb_size, config.train_epochs) == (0.03 * 24 / 256, 24, 5)
    assert (config.decay, config.weight_decay, config.head_lr_factor, config.drop_last) == (0.9999, 0, 1, True)
    assert [config.frozen_in(task) for task in range(3)] == [0, 3, 3]
    assert [LAEConfig(train_epochs=50).frozen_in(task) for task in range(3)] == [0, 30, 30]
    assert LAEConfig(frozen_epochs=5).frozen_in(1) == 5


def test_number_of_parameters_of_the_paper(tiny_vit: Callable[..., nn.Module]) -> None:
    """8,454 numbers in each of the blocks 0-4 of a ViT of width 768."""
    strategy = LAE(model=tiny_vit(width=768, depth=6, heads=12, img_size=16), evaluator=None)
    bank = strategy.model.bank
    assert bank is not None
    assert bank.blocks == (0, 1, 2, 3, 4)
    assert [bank.adapter.num_parameters(site) for site in bank.sites] == [8454] * 5
    assert {(site.source.module.split(".")[-1], site.source.end) for site in bank.sites} == {("norm1", "out")}


def test_epochs_of_a_task(make: Make, three_tasks: list[Any]) -> None:
    """Frozen epochs leave the adapter's bits; the rate is constant; the head's moments go on over the thaw."""
    strategy = make(head_lr_factor=0.5)
    optimizer = strategy.optimizer
    assert isinstance(optimizer, torch.optim.Adam)
    for task, experience in enumerate(three_tasks[:2]):  # the third has one class, which leaves no gradient
        seen = recorded(strategy, experience)
        assert seen.rates == [[0.01, 0.005]] * 5
        assert {(group["betas"], group["weight_decay"]) for group in optimizer.param_groups} == {((0.9, 0.999), 0.0)}
        frozen = 3 if task else 0
        assert seen.trains == [epoch >= frozen for epoch in range(5)]
        assert seen.moments == [(3 * (e + 1), 3 * max(0, e + 1 - frozen)) for e in range(5)]
        after = [*seen.online[1:], strategy.model.bank.export(0)]
        assert [same(a, b) for a, b in zip(seen.online, after, strict=True)] == [epoch < frozen for epoch in range(5)]
        assert any((after[-1][key] != seen.online[0][key]).any() for key in after[-1] if key.endswith("scale"))
    assert strategy.optimizer is optimizer


def test_head_rows_start_small_and_rest_after_their_task(make: Make, three_tasks: list[Any]) -> None:
    """N(0, 0.001) with bias 0; rows of finished tasks keep their bits through Adam steps of later tasks."""
    strategy = make()
    starts: list[tuple[Tensor, Tensor]] = []

    class AtStart(SupervisedPlugin):
        def before_training_exp(self, strategy: Any, **kwargs: Any) -> None:
            head = strategy.model.head
            starts.append((head.weight.detach().clone(), head.bias.detach().clone()))

    strategy.plugins.append(AtStart())
    finished: list[tuple[Tensor, Tensor]] = []
    for experience in three_tasks:
        strategy.train(experience)
        head = strategy.model.head
        for weight, bias in finished:
            assert torch.equal(head.weight[: len(weight)], weight)
            assert torch.equal(head.bias[: len(bias)], bias)
        old = len(finished[-1][0]) if finished else 0
        assert (starts[-1][0][old:] - head.weight[old:]).abs().max() > 1e-3 or len(head.weight) - old == 1
        finished.append((head.weight.detach().clone(), head.bias.detach().clone()))
    rows = torch.cat([weight[known:] for (weight, _), known in zip(starts, (0, 2, 5), strict=True)])
    assert rows.shape == (6, 16)
    assert 0.0007 < float(rows.std()) < 0.0013
    assert not torch.cat([bias[known:] for (_, bias), known in zip(starts, (0, 2, 5), strict=True)]).any()


@pytest.mark.parametrize(("batch", "drop", "steps"), [(5, True, 2), (5, False, 3), (12, True, 1), (50, True, 1)])
def test_incomplete_batches(make: Make, three_tasks: list[Any], batch: int, drop: bool, steps: int) -> None:
    """12 images: an incomplete last batch is left out, but not where it is the only one."""
    strategy = make(train_mb_size=batch, drop_last=drop, train_epochs=1)
    strategy.train(three_tasks[0])
    assert strategy.clock.train_iterations == steps
    strategy.train(three_tasks[1], drop_last=False)
    assert strategy.clock.train_exp_iterations == -(-12 // batch), "what the call says counts"
    cached = make(train_mb_size=batch, drop_last=drop, train_epochs=1, blocks=(2,), cached_views=1)
    cached.train(three_tasks[0])
    assert cached.clock.train_iterations == steps, "batches of cached views too"


# --- accumulation ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("decay", [0.9, 0.9999])
def test_offline_adapter_is_the_moving_average(make: Make, three_tasks: list[Any], decay: float) -> None:
    """Starts as the adapter after task 0; then NumPy's recursion over the online weights, learned scales too."""
    strategy = make(decay=decay)
    strategy.train(three_tasks[0])
    assert strategy.model.num_slots == 1
    average = {key: value.numpy().astype(np.float64) for key, value in strategy.model.bank.export(0).items()}
    steps = 0
    for experience in three_tasks[1:]:
        seen = recorded(strategy, experience)
        for step, (online, offline) in enumerate(seen.experts):
            if step:
                average = {key: decay * old + (1 - decay) * online[key].numpy() for key, old in average.items()}
                steps += 1
            assert all(np.allclose(offline[key], average[key], rtol=0, atol=2e-6) for key in average), step
            if steps <= 9:
                assert same(online, offline), "frozen and equal: the average stays where it is, to the bit"
        moved = max(float((online[key] - offline[key]).abs().max()) for key in online)
        assert moved > 1e-3
    assert steps == 30
    assert any(key.endswith("scale") for key in average)
    part = strategy.model.part("accumulation", Accumulation)
    assert int(part.steps) == steps
    assert part.share_of_start(decay) == pytest.approx(decay**30)


def test_weight_of_the_start_after_k_steps(make: Make, three_tasks: list[Any]) -> None:
    """The online adapter at 1, its start at 0: after k steps the average is 1 - decay^k."""
    strategy = make(decay=0.99, frozen_epochs=5)
    strategy.train(three_tasks[0])
    bank = strategy.model.bank
    assert bank is not None

    class Jump(SupervisedPlugin):
        def before_training_exp(self, strategy: Any, **kwargs: Any) -> None:
            with torch.no_grad():
                for online, offline in zip(bank.slot_parameters(0), bank.slot_parameters(1), strict=True):
                    online.fill_(1)
                    offline.fill_(0)

    strategy.plugins.append(Jump())
    strategy.train(three_tasks[1])
    for value in bank.export(1).values():
        assert torch.allclose(value, torch.full_like(value, 1 - 0.99**15), atol=1e-6)
    assert all(bool((value == 1).all()) for value in bank.export(0).values())


def test_steps_and_average_go_on_after_loading(make: Make, three_tasks: list[Any], tmp_path: Path) -> None:
    """Saved after task 1 (15 steps), loaded, gone on: the bits of an uninterrupted run."""
    strategy = make()
    for experience in three_tasks[:2]:
        strategy.train(experience)
    path = strategy.model.save(tmp_path / "model")
    loaded = AdapterModel.load(path, FrozenBackbone.wrap(copy.deepcopy(strategy.model.backbone.encoder)))
    steps = loaded.part("accumulation", Accumulation).steps
    assert steps.dtype == torch.int64
    assert int(steps) == 15
    again = make(model=loaded)
    for each in (strategy, again):
        each.train(three_tasks[2])
        assert int(each.model.part("accumulation", Accumulation).steps) == 30
    for slot in (0, 1):
        assert same(strategy.model.bank.export(slot), again.model.bank.export(slot))
    x = torch.randn(7, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    assert torch.equal(strategy.model.predict(x), again.model.predict(x))


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


def test_predictors_and_passes(make: Make, three_tasks: list[Any]) -> None:
    """One expert after task 0, two from task 1 on, also while it trains; the answer is that of both experts."""
    strategy = make(train_epochs=2, decay=0.5)
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
def test_every_adapter_type_on_every_family(name: str, kind: str, make: Make, three_tasks: list[Any]) -> None:
    """Trains, accumulates and answers with both; a type without sites says so before any training."""
    options = {"adapter": {"type": name}, "model": _backbone(kind), "train_epochs": 2}
    if kind in EXCEPTIONS.get(name, ()):
        with pytest.raises(IncompatibleBackbone, match=r"has no sites of kind|needs feature maps"):
            make(**options)
        return
    strategy = make(**options)
    bank = strategy.model.bank
    assert bank is not None
    for task, experience in enumerate(three_tasks[:2]):
        seen = recorded(strategy, experience)
        assert not same(seen.online[0], bank.export(0))
        assert [same(a, b) for a, b in zip(seen.online, seen.online[1:], strict=False)] == [task == 1]
    assert not same(bank.export(0), bank.export(1))
    assert strategy.model.predict(torch.randn(3, 3, 16, 16)).isfinite().all()
    assert strategy.model.answer(torch.randn(3, 3, 16, 16)).passes.tolist() == [2, 2, 2]


EXCEPTIONS: dict[str, tuple[str, ...]] = {
    "bottleneck": ("convnext",),  # LAE's place is the attention
    "lora": ("convnext",),
    "prefix": ("swin", "convnext"),
    "conv_bottleneck": ("vit",),
}
"""Which adapter types have no sites in which family."""


def test_first_blocks_follow_the_backbone(make: Make) -> None:
    """As many as there are: 3 of a ViT of depth 3; counted through the stages where blocks lie in stages."""
    assert make().model.bank.blocks == (0, 1, 2)
    assert make(first_blocks=2).model.bank.blocks == (0, 1)
    assert make(blocks=(1,)).model.bank.blocks == (1,)
    assert make(model=_backbone("swin"), first_blocks=3).model.bank.blocks == (0, 1, 2)
    assert make(model=_backbone("convnext"), first_blocks=4, adapter="conv_bottleneck").model.bank.blocks == (
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
def test_options_out_of_range(make: Make, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make(**options)


def test_slots_of_the_ensemble() -> None:
    with pytest.raises(ValueError, match="different adapters"):
        MaxEnsemble(slots=(0, 0))
