"""AdaptedNet is a plain module: Avalanche's strategies and a loop of one's own train it, and it becomes a model."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from cl_adapters import AdapterModel, FrozenBackbone
from cl_adapters._seeding import isolated
from cl_adapters.adapters.lora import LoRA
from cl_adapters.errors import ClAdaptersError, ConfigError, DataError, UnknownName
from cl_adapters.strategies import AdaptedNet

CLASSES = 4
STRATEGIES: dict[str, dict[str, Any]] = {
    "Naive": {},
    "Cumulative": {},
    "JointTraining": {},
    "Replay": {"mem_size": 4},
    "DER": {"mem_size": 8, "batch_size_mem": 2},
    "ER_ACE": {"mem_size": 8, "batch_size_mem": 2},
    "GEM": {"patterns_per_exp": 4, "memory_strength": 0.5},
    "AGEM": {"patterns_per_exp": 4, "sample_size": 4},
    "EWC": {"ewc_lambda": 1.0},
    "MAS": {},
    "SynapticIntelligence": {"si_lambda": 1.0},
    "LwF": {"alpha": 1.0, "temperature": 2.0},
    "MIR": {"mem_size": 8, "batch_size_mem": 2, "subsample": 4},
    "GDumb": {"mem_size": 8},
    "FromScratchTraining": {},
}


@pytest.fixture
def backbone(tiny_vit: Callable[..., nn.Module]) -> FrozenBackbone:
    return FrozenBackbone.wrap(tiny_vit(width=16, depth=2, heads=2, img_size=16))


@pytest.fixture(scope="module")
def samples() -> tuple[Tensor, Tensor]:
    """16 images of 4 classes that differ in colour, in the order of the classes, and their labels."""
    draw = torch.Generator().manual_seed(0)
    y = torch.arange(CLASSES).repeat_interleave(4)
    means = 2 * torch.randn(CLASSES, 3, 1, 1, generator=draw)
    return means[y] + 0.3 * torch.randn(len(y), 3, 16, 16, generator=draw), y


def values(net: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in net.named_parameters()}


def train(net: nn.Module, x: Tensor, y: Tensor, steps: int) -> float:
    """The last loss of a plain loop."""
    optimizer = torch.optim.Adam(net.parameters(), lr=0.02)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(net(x), y)
        loss.backward()
        optimizer.step()
    return loss.item()


@pytest.fixture
def trained(backbone: FrozenBackbone, samples: tuple[Tensor, Tensor]) -> AdaptedNet:
    net = AdaptedNet(backbone, CLASSES)
    train(net, *samples, steps=3)
    return net.eval()


@pytest.mark.parametrize("name", STRATEGIES)
def test_strategies_of_avalanche_train_it(name: str, backbone: FrozenBackbone, samples: tuple[Tensor, Tensor]) -> None:
    from avalanche.benchmarks import nc_benchmark
    from avalanche.training import supervised
    from avalanche.training.plugins import EvaluationPlugin

    if name == "GEM":
        pytest.importorskip("quadprog")
    data: Any = TensorDataset(*samples)
    data.targets = samples[1].tolist()
    fingerprint = backbone.fingerprint
    net = AdaptedNet(backbone, CLASSES)
    before = values(net)
    with isolated():
        torch.manual_seed(0)
        benchmark = nc_benchmark(data, data, n_experiences=2, task_labels=False, seed=0)
        strategy = getattr(supervised, name)(
            model=net,
            optimizer=torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9),
            criterion=nn.CrossEntropyLoss(),
            train_mb_size=4,
            train_epochs=1,
            eval_mb_size=8,
            evaluator=EvaluationPlugin(),
            **STRATEGIES[name],
        )
        for experiences in [benchmark.train_stream] if name == "JointTraining" else benchmark.train_stream:
            strategy.train(experiences)
            strategy.eval(benchmark.test_stream)
    after = values(strategy.model)
    assert before.keys() == after.keys()
    assert all(not torch.equal(before[key], after[key]) for key in before)
    assert FrozenBackbone.wrap(backbone.encoder).fingerprint == fingerprint
    assert not backbone.encoder.training and not any(value.requires_grad for value in backbone.parameters())


def test_a_plain_loop_learns(backbone: FrozenBackbone, samples: tuple[Tensor, Tensor]) -> None:
    x, y = samples
    net = AdaptedNet(backbone, CLASSES)
    first = train(net, x, y, steps=1)
    assert train(net, x, y, steps=40) < 0.1 < first
    assert torch.equal(net.eval()(x).argmax(1), y)
    assert net(x).shape == (len(y), CLASSES) and net(x).dtype == torch.float32


def test_only_adapter_and_head_are_parameters_and_saved(backbone: FrozenBackbone) -> None:
    net = AdaptedNet(backbone, CLASSES, {"type": "lora", "rank": 2}, blocks=[1]).train()
    names = [name for name, _ in net.named_parameters()]
    assert names == list(net.state_dict()) and names[-2:] == ["head.weight", "head.bias"]
    assert all(name.startswith("bank.") for name in names[:-2]) and net.bank.blocks == (1,)
    assert isinstance(net.bank.adapter, LoRA)
    assert not backbone.encoder.training and not list(net.requires_grad_().modules()).count(backbone)
    assert not any(value.requires_grad for value in backbone.parameters())
    net.to(torch.float64)  # the backbone goes along
    assert {value.dtype for value in [*net.parameters(), *backbone.parameters()]} == {torch.float64}


def test_state_goes_into_a_new_one(
    trained: AdaptedNet, backbone: FrozenBackbone, samples: tuple[Tensor, Tensor]
) -> None:
    new = AdaptedNet(backbone, CLASSES, seed=1).eval()
    assert not torch.equal(new(samples[0]), trained(samples[0]))
    new.load_state_dict(trained.state_dict())
    assert torch.equal(new(samples[0]), trained(samples[0]))


def test_a_deepcopy_is_independent(trained: AdaptedNet, samples: tuple[Tensor, Tensor]) -> None:
    x, y = samples
    teacher = copy.deepcopy(trained)
    before = trained(x)
    assert torch.equal(teacher(x), before)
    trained.train()
    twin = copy.deepcopy(trained)
    assert train(trained, x, y, steps=3) == train(twin, x, y, steps=3)  # dropout included
    assert torch.equal(teacher(x), before) and not torch.equal(trained.eval()(x), before)
    assert torch.equal(trained(x), twin.eval()(x))


def test_one_seed_gives_one_net(backbone: FrozenBackbone, samples: tuple[Tensor, Tensor]) -> None:
    x, y = samples
    same = [AdaptedNet(backbone, CLASSES, seed=3) for _ in range(2)]
    assert train(same[0], x, y, steps=2) == train(same[1], x, y, steps=2)
    assert all(torch.equal(a, b) for a, b in zip(*(net.parameters() for net in same), strict=True))
    other = AdaptedNet(backbone, CLASSES, seed=4)
    assert not torch.equal(other.head.weight, AdaptedNet(backbone, CLASSES, seed=3).head.weight)
    same[0].train()
    assert not torch.equal(same[0](x), same[0](x))  # a new mask in every pass
    same[0].eval()
    assert torch.equal(same[0](x), same[0](x))


def test_it_becomes_a_model(
    trained: AdaptedNet, backbone: FrozenBackbone, samples: tuple[Tensor, Tensor], tmp_path: Path
) -> None:
    x, y = samples
    with torch.no_grad():
        logits = trained(x)
    assert torch.equal(trained.as_model().predict(x), logits)
    model = trained.as_model([3, 1], [0], class_names={3: "three"})
    assert model.classes == [3, 1, 0] and model.num_tasks == 2 and model.name_of(3) == "three"
    torch.testing.assert_close(model.predict(x), logits[:, [3, 1, 0]])
    predicted = model.predict(x)
    model.save(tmp_path / "model")
    assert torch.equal(AdapterModel.load(tmp_path / "model", backbone).predict(x), predicted)
    pool = trained.as_model().save_pool(tmp_path / "pool")
    assert [record.labels for record in pool.records] == [(0, 1, 2, 3)]
    assert torch.equal(AdapterModel.from_pool(pool, backbone=backbone).predict(x), logits)
    train(trained.train(), x, y, steps=1)
    assert torch.equal(model.predict(x), predicted)


@pytest.mark.parametrize("num_classes", [0, -1, 2.0, "4"])
def test_a_number_of_classes_that_is_none(backbone: FrozenBackbone, num_classes: Any) -> None:
    with pytest.raises(ConfigError, match=r"num_classes must be a whole number from 1"):
        AdaptedNet(backbone, num_classes)


def test_what_cannot_be_says_so(backbone: FrozenBackbone) -> None:
    with pytest.raises(UnknownName, match="bottelneck"):
        AdaptedNet(backbone, CLASSES, "bottelneck")
    with pytest.raises(ConfigError, match="each block once"):
        AdaptedNet(backbone, CLASSES, blocks=[0, 0])
    with pytest.raises(ClAdaptersError, match=r"blocks \[7\] do not exist"):
        AdaptedNet(backbone, CLASSES, blocks=[7])
    net = AdaptedNet(backbone, CLASSES)
    refused: list[Any] = [[[1, 4]], [[1, 1]], [[1], [1]], [[]], [["1"]]]
    for tasks in refused:
        with pytest.raises(DataError):
            net.as_model(*tasks)


def test_it_needs_no_avalanche(repo_root: Path) -> None:
    script = "import sys; from cl_adapters.strategies import AdaptedNet; assert 'avalanche' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", script], cwd=repo_root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
