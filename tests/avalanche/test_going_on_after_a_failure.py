"""An error or Ctrl-C in the middle of an experience: model and strategy are what they were before it, bit for bit."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from avalanche.benchmarks import benchmark_from_datasets
from avalanche.benchmarks.utils import as_classification_dataset
from avalanche.core import SupervisedPlugin
from avalanche.training.plugins import LRSchedulerPlugin, ReplayPlugin
from torch import Tensor, nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import StepLR

from cl_adapters.adapters.prefix import Prefix
from cl_adapters.backbones.frozen import FrozenBackbone
from cl_adapters.bank.bank import AdapterBank, Route
from cl_adapters.errors import ClAdaptersError, ConfigError, DataError, TrainingDiverged
from cl_adapters.model.heads import LinearHead
from cl_adapters.model.statistics import FullGaussian
from cl_adapters.strategies import Sequential
from cl_adapters.strategies._loop.snapshot import Snapshot
from cl_adapters.strategies.base import AdapterStrategy, strategies
from tests.avalanche.streams import two_experiences

Vit = Callable[..., nn.Module]

SMALL: dict[str, dict[str, Any]] = {
    "mos": {"alignment": {"epochs": 2}},
    "ranpac": {"projection": 24},
    "sema": {"threshold": 1e-6, "descriptor_epochs": 2, "descriptor_dim": 4, "scan_mb_size": 6, "last_blocks": 2},
    "lae": {"frozen_epochs": 1},
}
TRAINED = [name for name in strategies.names() if name != "simple_cil"]
MOMENTS = (
    "before_train_dataset_adaptation",
    "after_train_dataset_adaptation",
    "before_training_exp",
    "before_training_epoch",
    "before_training_iteration",
    "after_forward",
    "before_backward",
    "after_backward",
    "before_update",
    "after_update",
    "after_training_iteration",
    "after_training_epoch",
)


class Failing(SupervisedPlugin[Any]):
    """Raises at the second call of one callback where there are several, else at the only one."""

    def __init__(self) -> None:
        super().__init__()
        self.moment, self.left = "", 0
        self.error: type[BaseException] = KeyboardInterrupt

    def at(self, moment: str, error: type[BaseException] = KeyboardInterrupt) -> Failing:
        self.moment, self.error = moment, error
        self.left = 2 if any(word in moment for word in ("epoch", "iteration", "update", "ward")) else 1
        return self

    def __getattribute__(self, key: str) -> Any:
        if key.startswith(("before_", "after_")) and key == self.moment:
            return self.count
        return super().__getattribute__(key)

    def count(self, strategy: Any, **_: Any) -> None:
        self.left -= 1
        if not self.left:
            raise self.error(self.moment)


def make(name: str, tiny_vit: Vit, **options: Any) -> Any:
    """A small strategy, with keys."""
    known: dict[str, Any] = {"keys": "centroids", "evaluator": None, "train_mb_size": 6, "eval_mb_size": 6, "seed": 3}
    if name != "simple_cil":
        known |= {"train_epochs": 2, "lr": 0.05}
    cls: Any = strategies.get(name)
    model = tiny_vit(width=16, heads=2, img_size=16, depth=2)
    made = cls(model=model, **{**known, **SMALL.get(name, {}), **options})
    made.model.train()
    made.is_training = True  # every call of Avalanche's train() leaves both so
    return made


def state(strategy: Any) -> dict[str, Any]:
    """All that training may change, in plain values."""
    model = strategy.model
    found: dict[str, Any] = {f"model.{key}": value.clone() for key, value in model.state_dict().items()}
    for key, value in model.named_parameters():
        found[f"flags.{key}"] = (value.requires_grad, value.grad is None)
    if model.statistics is not None:
        found |= {f"statistics.{key}": value.clone() for key, value in model.statistics.tensors().items()}
    for key in ("classes", "class_names", "task_of_slot", "origins", "record_of_slot", "predictor", "num_slots"):
        found[key] = copy.deepcopy(getattr(model, key))
    found["task_of_column"] = model.task_of_column.clone()
    found["parts"] = {key: copy.deepcopy(part.description()) for key, part in model.parts.items()}
    found["modules"] = [(key, module.training) for key, module in model.named_modules()]
    found["random"] = (torch.get_rng_state(), random.getstate())
    found["clock"] = dict(vars(strategy.clock))
    found["optimizer"] = [
        [(key, value if key != "params" else list(map(id, value))) for key, value in group.items()]
        for group in strategy.optimizer.param_groups
    ]
    found["gathered"] = {id(p): {k: str(v) for k, v in s.items()} for p, s in strategy.optimizer.state.items()}
    found["task labels"] = copy.deepcopy(strategy._task_classes._classes)
    found["data"] = len(getattr(strategy, "_datasets", ()))
    found["own"] = {
        key: str(value)
        for key, value in sorted(vars(strategy).items())
        if key not in ("plugins", "loss", "_distributed_check")
        and isinstance(value, int | float | str | tuple | list | Tensor)
    }
    return found


def differing(first: dict[str, Any], second: dict[str, Any], *but: str) -> list[str]:
    """Keys whose values are not the same, bit for bit."""

    def same(a: Any, b: Any) -> bool:
        if isinstance(a, Tensor) and isinstance(b, Tensor):
            return a.dtype == b.dtype and torch.equal(a, b)
        if isinstance(a, tuple) and isinstance(b, tuple):
            return len(a) == len(b) and all(map(same, a, b))
        return bool(a == b)

    first, second = (each | {f"own.{key}": value for key, value in each["own"].items()} for each in (first, second))
    but = (*but, "own", *(f"own.{key}" for key in first["own"] | second["own"] if "own" in but))
    keys = first.keys() | second.keys()
    return sorted(
        k for k in keys if k not in but and (k not in first or k not in second or not same(first[k], second[k]))
    )


THIS_OBJECT = ("optimizer", "gathered", "random", "own")
"""What names parameters by their place in memory, or is not the model's."""


@pytest.fixture(params=strategies.names())
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@contextmanager
def raising(monkeypatch: pytest.MonkeyPatch, method: str) -> Iterator[None]:
    """A method of the strategies is interrupted before it does anything."""

    def interrupted(self: Any, *_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(AdapterStrategy, method, interrupted)
        yield


def test_interrupted_at_every_moment(name: str, tiny_vit: Vit, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the first experience and in the second, one failure after the other; then both as if nothing had been."""
    stream, plugin = two_experiences(), Failing()
    calm, strategy = make(name, tiny_vit), make(name, tiny_vit, plugins=[plugin])
    for task, experience in enumerate(stream):
        before, failed = state(strategy), 0
        for moment in MOMENTS:
            plugin.at(moment)
            if name in ("simple_cil", "ranpac", "aper") and plugin.left == 2 and (task or name == "simple_cil"):
                continue  # nothing is trained then
            with pytest.raises(KeyboardInterrupt):
                strategy.train(experience)
            assert not differing(before, state(strategy)), moment
            failed += 1
        plugin.at("")
        for method in ("_take_keys", "training_features"):  # after and in the middle of consolidation
            with raising(monkeypatch, method), pytest.raises(KeyboardInterrupt):
                strategy.train(experience)
            assert not differing(before, state(strategy)), method
            failed += 1
        assert failed >= 5
        for each in (calm, strategy):
            each.train(experience)
        assert not differing(state(calm), state(strategy), *THIS_OBJECT)
    if name == "sema":
        assert strategy.expansions, "something grew because of the data"


def test_another_experience_after_the_one_that_failed(name: str, tiny_vit: Vit) -> None:
    stream, plugin = two_experiences(), Failing()
    calm, strategy = make(name, tiny_vit), make(name, tiny_vit, plugins=[plugin.at("before_training_exp", ValueError)])
    with pytest.raises(ValueError, match="before_training_exp"):
        strategy.train(stream[0])
    plugin.at("")
    for each in (calm, strategy):
        each.train(stream[1])
        each.train(stream[0])
    assert not differing(state(calm), state(strategy), *THIS_OBJECT)
    assert strategy.model.classes == [2, 3, 0, 1]


def test_a_stream_that_fails_in_its_second_experience_keeps_the_first(name: str, tiny_vit: Vit) -> None:
    class Second(Failing):
        def before_training_exp(self, strategy: Any, **_: Any) -> None:
            if strategy.task == 1:
                raise KeyboardInterrupt

    stream = two_experiences()
    calm, strategy = make(name, tiny_vit), make(name, tiny_vit, plugins=[Second()])
    calm.train(stream[0])
    with pytest.raises(KeyboardInterrupt):
        strategy.train(stream)
    assert strategy.model.classes == [0, 1]
    assert strategy.experience is None
    assert not differing(state(calm), state(strategy), *THIS_OBJECT)
    strategy.plugins = [each for each in strategy.plugins if not isinstance(each, Second)]
    for each in (calm, strategy):
        each.train(stream[1])
    assert not differing(state(calm), state(strategy), *THIS_OBJECT)


def test_what_fails_behind_the_end_of_an_experience_undoes_nothing(name: str, tiny_vit: Vit) -> None:
    stream, plugin = two_experiences(), Failing()
    calm, strategy = make(name, tiny_vit), make(name, tiny_vit, plugins=[plugin.at("after_training_exp", OSError)])
    with pytest.raises(OSError, match="after_training_exp"):
        strategy.train(stream[0])
    assert strategy.model.classes == [0, 1]
    plugin.at("")
    calm.train(stream[0])
    for each in (calm, strategy):
        each.train(stream[1])
    assert not differing(state(calm), state(strategy), *THIS_OBJECT, "clock")


def odd(what: str) -> Any:
    """An experience of classes 2 and 3 with one thing wrong."""
    labels: list[Any] = [2, 3] * 3
    size = 24 if what == "size" else 16
    images = torch.randn(6, 3, size, size, generator=torch.Generator().manual_seed(4))
    if what == "label":
        labels[4] = -1
    if what == "nan":
        images[4, 0, 0, 0] = torch.nan
    data: Any = torch.utils.data.TensorDataset(images, torch.tensor(labels))
    data.targets = labels
    return benchmark_from_datasets(train=[as_classification_dataset(data)]).train_stream[0]


REFUSALS: dict[str, tuple[type[Exception], ...]] = {
    "label": (DataError,),
    "size": (ClAdaptersError, AssertionError, RuntimeError),  # of timm, or of torch for two sizes in a batch
    "nan": (DataError, TrainingDiverged),
}


@pytest.mark.parametrize("what", REFUSALS)
def test_a_refused_experience_changes_nothing(name: str, what: str, tiny_vit: Vit) -> None:
    stream, calm, strategy = two_experiences(), make(name, tiny_vit), make(name, tiny_vit)
    for task in range(2):
        before = state(strategy)
        with pytest.raises(REFUSALS[what]):
            strategy.train(odd(what))
        assert not differing(before, state(strategy))
        for each in (calm, strategy):
            each.train(stream[task])
    assert not differing(state(calm), state(strategy), *THIS_OBJECT)


def test_task_labels_that_are_missing(name: str, tiny_vit: Vit) -> None:
    strategy = make(name, tiny_vit, task_incremental=True)
    before = state(strategy)
    with pytest.raises(ConfigError, match="task_incremental=True needs one task label"):
        strategy.train(two_experiences()[0])
    assert not differing(before, state(strategy))


@pytest.mark.parametrize("name", TRAINED)
def test_divergence(name: str, tiny_vit: Vit) -> None:
    """After a rate that is too high, a lower one from the same model."""
    first = two_experiences()[0]
    calm, strategy = make(name, tiny_vit), make(name, tiny_vit, lr=1e30, train_epochs=4)
    before = state(strategy)
    with pytest.raises(TrainingDiverged):
        strategy.train(first)
    assert not differing(before, state(strategy))
    strategy.config = calm.config
    for each in (calm, strategy):
        each.train(first)
    assert not differing(state(calm), state(strategy), *THIS_OBJECT)


@pytest.mark.parametrize("name", TRAINED)
def test_an_own_optimizer_with_schedule_and_replay(name: str, tiny_vit: Vit) -> None:
    stream, plugin = two_experiences(), Failing()

    def made(*more: Any) -> Any:
        model = FrozenBackbone.wrap(tiny_vit(width=16, heads=2, img_size=16, depth=2))
        optimizer = AdamW(model.parameters(), lr=0.01)
        plugins = [LRSchedulerPlugin(StepLR(optimizer, 1, gamma=0.5)), ReplayPlugin(mem_size=6), *more]
        options = {"keys": "centroids", "train_mb_size": 6, "train_epochs": 2, **SMALL.get(name, {})}
        return strategies.get(name)(model, optimizer, evaluator=None, plugins=plugins, **options)

    calm, strategy = made(), made(plugin)
    plugin.at("after_update" if name not in ("aper", "ranpac") else "before_training_exp")
    calm.train(stream[0])
    with pytest.raises(KeyboardInterrupt):
        strategy.train(stream[0])
    plugin.at("")
    strategy.train(stream[0])
    plugin.at("before_training_exp")
    with pytest.raises(KeyboardInterrupt):
        strategy.train(stream[1])
    plugin.at("")
    for each in (calm, strategy):
        each.train(stream[1])
    assert not differing(state(calm), state(strategy), *THIS_OBJECT)


def test_references_stay_valid(tiny_vit: Vit) -> None:
    """Who holds the model, its bank, its head or its lists has them also after a failure."""
    stream, plugin = two_experiences(), Failing()
    strategy = make("mos", tiny_vit, plugins=[plugin])
    strategy.train(stream[0])
    model = strategy.model
    x = stream[0].dataset[0][0][None]
    held = (model.bank, model.head, model.classes, model.prototypes, model.parts["class_keys"], model.head.weight)
    weights, logits = model.bank.slot_parameters(0), model.predict(x)
    plugin.at("after_training_epoch")
    with pytest.raises(KeyboardInterrupt):
        strategy.train(stream[1])
    assert strategy.model is model
    now = (model.bank, model.head, model.classes, model.prototypes, model.parts["class_keys"], model.head.weight)
    assert all(a is b for a, b in zip(held, now, strict=True))
    assert all(a is b for a, b in zip(weights, model.bank.slot_parameters(0), strict=True))
    assert torch.equal(model.predict(x), logits), "the hooks in the backbone see the same adapters"


def test_two_objects_with_one_state(tiny_vit: Vit) -> None:
    """The model may be seen through another object whose attributes are the same dict."""
    stream, plugin = two_experiences(), Failing()
    strategy = make("mos", tiny_vit, plugins=[plugin])
    model = strategy.model
    view: Any = object.__new__(type("View", (type(model),), {}))
    view.__dict__ = vars(model)
    strategy.model = view
    strategy.train(stream[0])
    before, kept = state(strategy), {key: value.clone() for key, value in model.state_dict().items()}
    plugin.at("after_training_epoch")
    with pytest.raises(KeyboardInterrupt):
        strategy.train(stream[1])
    assert strategy.model is view
    assert vars(view) is vars(model)
    assert not differing(before, state(strategy))
    assert not differing(kept | {"own": {}}, model.state_dict() | {"own": {}})


def test_ctrl_c_in_the_middle_of_a_pass(name: str, tiny_vit: Vit) -> None:
    stream, strategy, calm = two_experiences(), make(name, tiny_vit), make(name, tiny_vit)
    calm.train(stream[0])
    block = strategy.model.backbone.encoder.blocks[1]

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    handle = block.register_forward_hook(interrupt)
    x = stream[0].dataset[0][0][None]
    with pytest.raises(KeyboardInterrupt):
        strategy.train(stream[0])
    handle.remove()
    bank = strategy.model.bank
    assert bank is None or bank._active.routes is None
    assert torch.equal(strategy.model.backbone.features(x), calm.model.backbone.features(x)), "bare"
    strategy.train(stream[0])
    assert not differing(state(calm), state(strategy), *THIS_OBJECT)


def test_ctrl_c_inside_an_attention_of_transformers() -> None:
    """Adapters that add inside an attention leave it as it was, after an interrupt too."""
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16, image_size=16, patch_size=8
    )
    torch.manual_seed(0)
    backbone = FrozenBackbone.wrap(transformers.ViTModel(config, add_pooling_layer=False).eval())
    bank = AdapterBank(backbone, Prefix())
    slot = bank.add_slot(bank.fresh(torch.Generator().manual_seed(0)))
    x = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    bare = backbone.features(x)
    with bank.route(Route.single(slot)):
        routed = backbone.features(x)
    assert not torch.equal(bare, routed)

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    attention = backbone.encoder.get_submodule(bank.sites[0].target.module)
    inner = next(module for module in attention.modules() if isinstance(module, nn.Linear))
    handle = inner.register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt), bank.route(Route.single(slot)):
        backbone.features(x)
    handle.remove()
    assert torch.equal(backbone.features(x), bare)
    with bank.route(Route.single(slot)):
        assert torch.equal(backbone.features(x), routed)


def test_an_evaluation_that_fails(name: str, tiny_vit: Vit) -> None:
    """By itself, and periodically in training: the strategy trains and evaluates on."""
    stream, plugin = two_experiences(), Failing()
    calm = make(name, tiny_vit)
    strategy = make(name, tiny_vit, plugins=[plugin], eval_every=0)
    for each in (calm, strategy):
        each.train(stream[0])
    before = state(strategy)
    modes = strategy.is_training
    plugin.at("after_eval_exp", OSError)
    with pytest.raises(OSError, match="after_eval_exp"):
        strategy.eval(stream)
    assert not differing(before, state(strategy), "clock")
    assert strategy.is_training == modes
    plugin.at("before_eval", OSError)
    with pytest.raises(OSError, match="before_eval"):
        strategy.train(stream[1], eval_streams=[stream])
    plugin.at("")
    assert strategy.model.classes == [0, 1]
    for each in (calm, strategy):
        each.train(stream[1])
        each.eval(stream)
    assert not differing(state(calm), state(strategy), *THIS_OBJECT, "clock")


class Third(Sequential):
    """Somebody else's strategy, with state of its own and not a line for failures."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.seen: dict[str, list[int]] = {"tasks": []}
        self.names: set[int] = set()
        self.mean = torch.zeros(16)
        self.extra = LinearHead(16)

    def grow(self, task: int) -> None:
        super().grow(task)
        self.seen["tasks"].append(task)
        self.names.add(task)
        self.extra.grow(1, self.generator("extra", task))

    def after_step(self) -> None:
        with torch.no_grad():
            self.mean += self.model.head.weight[0]
            self.extra.weight.mul_(2)


def test_a_strategy_of_somebody_else(tiny_vit: Vit) -> None:
    stream, plugin = two_experiences(), Failing()
    made = partial(Third, evaluator=None, train_mb_size=6, train_epochs=2)
    calm = made(tiny_vit(width=16, heads=2, img_size=16, depth=2))
    strategy = made(tiny_vit(width=16, heads=2, img_size=16, depth=2), plugins=[plugin])
    for experience in stream:
        mean = strategy.mean
        plugin.at("after_training_epoch")
        with pytest.raises(KeyboardInterrupt):
            strategy.train(experience)
        plugin.at("")
        assert strategy.mean is mean
        for each in (calm, strategy):
            each.train(experience)
    assert strategy.seen == calm.seen == {"tasks": [0, 1]}
    assert strategy.names == {0, 1}
    assert torch.equal(strategy.mean, calm.mean)
    assert torch.equal(strategy.extra.weight, calm.extra.weight)
    assert not differing(state(calm), state(strategy), *THIS_OBJECT)


def test_what_going_back_costs(tiny_vit: Vit) -> None:
    """No copy of the backbone, of finished adapters, of covariances, or of the optimizer's momentum."""
    kept: list[Snapshot] = []

    class Look(SupervisedPlugin[Any]):
        def before_training_exp(self, strategy: Any, **_: Any) -> None:
            kept.append(strategy._snapshot)

    strategy = make("mos", tiny_vit, plugins=[Look()])
    for experience in two_experiences():
        strategy.train(experience)
    assert strategy._snapshot is None, "nothing is held once an experience is finished"
    copied = {id(tensor) for tensor, copy_, *_ in kept[1]._tensors if copy_ is not None}
    model = strategy.model
    assert isinstance(model.statistics, FullGaussian)
    fixed = [*model.backbone.parameters(), *model.bank.slot_parameters(0), *model.statistics.tensors().values()]
    assert not copied & {id(each) for each in fixed}
    assert sum(copy_.numel() for _, copy_, *_ in kept[1]._tensors if copy_ is not None) < 500


def test_a_second_interrupt_while_going_back(tiny_vit: Vit, monkeypatch: pytest.MonkeyPatch) -> None:
    stream, plugin = two_experiences(), Failing()
    calm, strategy = make("mos", tiny_vit), make("mos", tiny_vit, plugins=[plugin])
    for each in (calm, strategy):
        each.train(stream[0])
    plugin.at("after_training_epoch", OSError)

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("cl_adapters.strategies._loop.snapshot.torch.inference_mode", interrupted)
        with pytest.raises(KeyboardInterrupt):
            strategy.train(stream[1])
    plugin.at("")
    for each in (calm, strategy):
        each.train(stream[1])
    assert not differing(state(calm), state(strategy), *THIS_OBJECT)


@pytest.mark.parametrize("call", ["train", "save_pool"])
def test_in_the_middle_of_an_experience_nothing_is_trained_or_saved(call: str, tiny_vit: Vit, tmp_path: Path) -> None:
    stream = two_experiences()

    class Hasty(SupervisedPlugin[Any]):
        def before_training_epoch(self, strategy: Any, **_: Any) -> None:
            strategy.train(stream[1]) if call == "train" else strategy.save_pool(tmp_path / "half")

        def after_training_exp(self, strategy: Any, **_: Any) -> None:
            strategy.save_pool(tmp_path / "whole")

    strategy = make("mos", tiny_vit, plugins=[Hasty()])
    before = state(strategy)
    with pytest.raises(ClAdaptersError, match="task 0 is in training: a plugin may do this in after_training_exp"):
        strategy.train(stream[0])
    assert not differing(before, state(strategy))
    del Hasty.before_training_epoch
    strategy.train(stream[0])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["whole"]


def test_a_stream_with_cached_activations(tiny_vit: Vit) -> None:
    """Each experience of a stream has a cache of its own images."""
    stream = two_experiences()
    whole, parted = (make("mos", tiny_vit, cached_views=1, blocks=(1,)) for _ in range(2))
    whole.train(stream)
    for experience in stream:
        parted.train(experience)
    assert not differing(state(whole), state(parted), *THIS_OBJECT)
