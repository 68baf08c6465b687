"""``merge="released"``: the training schedule of the released MOS code, against a naive transcription of its loop.

Origin: vit_mos.py:360-377 and mos.py:205-230. Every forward pass of task t >= 1 calls, before each of its L layers, a
routine that merges ALL layers once with mu_t by assigning ``.data``; after the optimizer's step all layers are merged
once more. The transcription below does exactly that, on the ViT's blocks called one by one, with torch.optim.SGD.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from avalanche.core import SupervisedPlugin
from torch import Tensor, nn

from cl_adapters.model.facade import AdapterModel
from cl_adapters.strategies.mos import MOS

Layer = dict[str, Tensor]
LAYERS, MOMENTUM, SCALE = 3, 0.1, 0.1


class Recorder(SupervisedPlugin):
    """Keeps the batches, and the gradients with which the optimizer steps."""

    def __init__(self) -> None:
        super().__init__()
        self.batches: list[tuple[int, Tensor, Tensor]] = []
        self.gradients: list[list[Tensor]] = []

    def before_forward(self, strategy: Any, **kwargs: Any) -> None:
        columns = strategy.model.columns_of(strategy.mb_y)
        self.batches.append((strategy.clock.train_exp_epochs, strategy.mb_x.clone(), columns))

    def before_update(self, strategy: Any, **kwargs: Any) -> None:
        slot = strategy.model.bank.slot_parameters(strategy.task)
        self.gradients.append([parameter.grad.clone() for parameter in slot])


def forward(
    vit: Any, x: Tensor, layers: Sequence[Mapping[str, Tensor]], before_layer: Callable[[], None] = lambda: None
) -> Tensor:
    """Features [B, D] of the ViT with one adapter per block: out = h + MLP(LN2 h) + 0.1 (W_up ReLU(W_down h))."""
    x = vit._pos_embed(vit.patch_embed(x))
    for block, w in zip(vit.blocks, layers, strict=True):
        before_layer()
        h = x + block.attn(block.norm1(x))
        hidden = F.relu(F.linear(h, w["down"], w["down_bias"]))
        x = h + block.mlp(block.norm2(h)) + SCALE * F.linear(hidden, w["up"], w["up_bias"])
    features: Tensor = vit.norm(x)[:, 0]
    return features


def loss_of(f: Tensor, weight: Tensor, bias: Tensor, columns: Tensor, known: int, means: Tensor) -> Tensor:
    logits = F.linear(f, weight, bias)
    logits = torch.cat([logits[:, :known] * 0 - math.inf, logits[:, known:]], 1)
    rows = torch.cat([means, f])
    return F.cross_entropy(logits, columns) + 0.1 * F.cross_entropy(rows @ rows.T / 0.8, torch.arange(len(rows)))


def released_loop(
    vit: Any,
    start: list[Layer],
    head: tuple[Tensor, Tensor],
    mu: list[Layer],
    means: Tensor,
    batches: list[tuple[int, Tensor, Tensor]],
    epochs: int,
) -> tuple[list[Layer], Tensor, list[list[Tensor]]]:
    """The released training loop, naively. Returns the adapter, the head's weight and the gradients of every step."""
    layers = [{name: nn.Parameter(value.clone()) for name, value in w.items()} for w in start]
    weight, bias = (nn.Parameter(value.clone()) for value in head)
    parameters = [p for w in layers for p in w.values()]

    def merge_all() -> None:
        for w, anchor in zip(layers, mu, strict=True):
            for name, parameter in w.items():
                parameter.data = (1 - MOMENTUM) * parameter.data + MOMENTUM * anchor[name]

    groups = [{"params": parameters, "lr": 0.03}, {"params": [weight, bias], "lr": 0.003}]
    optimizer = torch.optim.SGD(groups, lr=0.03, momentum=0.9, weight_decay=5e-4)
    gradients = []
    for epoch, x, columns in batches:
        factor = 0.5 * (1 + math.cos(math.pi * epoch / epochs))
        for group, lr in zip(optimizer.param_groups, (0.03, 0.003), strict=True):
            group["lr"] = lr * factor
        optimizer.zero_grad()
        features = forward(vit, x, layers, merge_all)
        loss_of(features, weight, bias, columns, 2, means).backward()
        gradients.append([p.grad.clone() for p in parameters if p.grad is not None])
        optimizer.step()
        merge_all()
    return [{name: p.detach() for name, p in w.items()} for w in layers], weight.detach(), gradients


def by_layer(bank: Any, slot: int) -> list[Layer]:
    tensors = bank.export(slot)
    names = [f"blocks.{i}.ffn" for i in range(LAYERS)]
    return [{key.split("/")[1]: value for key, value in tensors.items() if key.startswith(name)} for name in names]


class Push(SupervisedPlugin):
    """Moves the adapter of task 1 away from its anchor before the first step, and keeps where training started."""

    def __init__(self, size: float) -> None:
        super().__init__()
        self.size = size
        self.start: list[Layer] = []
        self.head: tuple[Tensor, Tensor] = (torch.empty(0), torch.empty(0))

    def before_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for _, parameter in sorted(strategy.model.bank.named_slot(1)):
                parameter.add_(self.size * torch.randn(parameter.shape, generator=generator))
        self.start = by_layer(strategy.model.bank, 1)
        head = strategy.model.head
        self.head = (head.weight.detach().clone(), head.bias.detach().clone())


@dataclass
class Trained:
    """MOS in the released schedule after task 1, its model before it, and what happened in between."""

    strategy: MOS
    before: AdapterModel
    recorder: Recorder
    push: Push

    @property
    def mu(self) -> list[Layer]:
        return by_layer(self.before.bank, 0)

    @property
    def means(self) -> Tensor:
        assert self.before.statistics is not None
        return self.before.statistics.means_CD


@pytest.fixture
def trained(make_mos: Callable[..., MOS], two_tasks: list[Any]) -> Trained:
    strategy = make_mos(merge="released")
    strategy.train(two_tasks[0])
    result = Trained(strategy, copy.deepcopy(strategy.model), Recorder(), Push(0.5))
    strategy.plugins += [result.recorder, result.push]
    strategy.train(two_tasks[1])
    return result


def test_whole_training_equals_the_naive_loop(trained: Trained) -> None:
    """Gradients of every step, and the adapter and head after two epochs of three batches with momentum."""
    vit, push, mu = trained.before.backbone.encoder, trained.push, trained.mu
    wanted, weight, gradients = released_loop(
        vit, push.start, push.head, mu, trained.means, trained.recorder.batches, epochs=2
    )
    assert len(gradients) == len(trained.recorder.gradients) == 6
    for naive, ours in zip(gradients, trained.recorder.gradients, strict=True):
        scale = max(float(g.abs().max()) for g in naive)
        assert scale > 1e-4
        for a, b in zip(naive, ours, strict=True):
            assert (a - b).abs().max() < 2e-5 * scale
    for layer, naive_layer, anchor in zip(by_layer(trained.strategy.model.bank, 1), wanted, mu, strict=True):
        for name, value in layer.items():
            deviation = (naive_layer[name] - anchor[name]).abs().max()
            assert deviation > 1e-5, "the check is not empty"
            assert (value - naive_layer[name]).abs().max() < 2e-3 * deviation, name
    assert (trained.strategy.model.head.weight - weight).abs().max() < 1e-6


def test_gradients_are_those_of_the_forward_time_weights(trained: Trained) -> None:
    """Layer l has mu + 0.9^(l+1) (w - mu), and the gradient no factor of the merge; other powers would be seen."""
    push = trained.push
    _, x, columns = trained.recorder.batches[0]

    def gradients(power: Callable[[int], int]) -> list[Tensor]:
        layers = [
            {k: (mu[k] + 0.9 ** power(i) * (w[k] - mu[k])).requires_grad_() for k in w}
            for i, (w, mu) in enumerate(zip(push.start, trained.mu, strict=True))
        ]
        features = forward(trained.before.backbone.encoder, x, layers)
        loss_of(features, *push.head, columns, 2, trained.means).backward()
        return [value.grad for w in layers for value in w.values() if value.grad is not None]

    def distance(others: list[Tensor]) -> float:
        pairs = zip(trained.recorder.gradients[0], others, strict=True)
        return max(float((a - b).abs().max()) for a, b in pairs)

    wanted = gradients(lambda layer: layer + 1)
    scale = max(float(g.abs().max()) for g in wanted)
    assert distance(wanted) < 2e-5 * scale
    for wrong in (lambda layer: LAYERS, lambda layer: layer, lambda layer: 0, lambda layer: 1):
        assert distance(gradients(wrong)) > 1e-3 * scale


@pytest.mark.parametrize("merge", ["paper", "released"])
def test_evaluation_leaves_the_stored_adapters(make_mos: Callable[..., MOS], two_tasks: list[Any], merge: str) -> None:
    """The released code shrinks A_1 - A_0 to 0.28243, 0.07977, ... of itself with every batch; here nothing moves."""
    strategy = make_mos(merge=merge)
    strategy.train(two_tasks[0])
    strategy.train(two_tasks[1])
    before = {key: value.clone() for key, value in strategy.model.state_dict().items()}
    deviation = [b - a for a, b in zip(*(strategy.model.bank.slot_parameters(t) for t in (0, 1)), strict=True)]
    assert max(float(d.abs().max()) for d in deviation) > 1e-5
    for _ in range(4):
        strategy.eval(two_tasks)
    assert all(torch.equal(value, before[key]) for key, value in strategy.model.state_dict().items())


@pytest.mark.parametrize(("merge", "merges"), [("paper", 1), ("released", LAYERS + 1)])
def test_one_step_from_a_deviation(make_mos: Callable[..., MOS], two_tasks: list[Any], merge: str, merges: int) -> None:
    """With a learning rate of nearly 0 only the merging is left: 0.9^n of the deviation after one step."""
    strategy = make_mos(merge=merge, lr=1e-30, train_epochs=1, train_mb_size=12)
    strategy.train(two_tasks[0])
    push = Push(1.0)
    strategy.plugins.append(push)
    strategy.train(two_tasks[1])
    anchor, after = (by_layer(strategy.model.bank, slot) for slot in (0, 1))
    for i in range(LAYERS):
        for name, mu in anchor[i].items():
            wanted = mu + 0.9**merges * (push.start[i][name] - mu)
            assert torch.allclose(after[i][name], wanted, atol=1e-6)
