"""A saved strategy goes on as if it had never stopped: model, clock, evaluator, plugins."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from avalanche.benchmarks import nc_benchmark
from avalanche.checkpointing import maybe_load_checkpoint, save_checkpoint
from avalanche.evaluation.metrics import (
    TrainedExperienceAccuracy,
    accuracy_metrics,
    bwt_metrics,
    forgetting_metrics,
    forward_transfer_metrics,
    loss_metrics,
)
from avalanche.training.plugins import EarlyStoppingPlugin, EvaluationPlugin, LRSchedulerPlugin, ReplayPlugin
from avalanche.training.plugins import SupervisedPlugin as Plugin
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR

from cl_adapters._io import sealed
from cl_adapters.backbones.frozen import FrozenBackbone
from cl_adapters.errors import ClAdaptersError, ConfigError, StorageError
from cl_adapters.model.facade import AdapterModel
from cl_adapters.strategies import LAE, MOS, Joint, Sequential, SimpleCIL
from cl_adapters.strategies.base import AdapterStrategy, strategies
from tests.avalanche.streams import two_experiences

Backbone = Callable[[], FrozenBackbone]


@pytest.fixture
def backbone(tiny_vit: Callable[..., nn.Module]) -> Backbone:
    return lambda: FrozenBackbone.wrap(tiny_vit(width=16, heads=2, img_size=16, depth=2))


def new_evaluator(*more: Any) -> EvaluationPlugin:
    """What measures, and what remembers."""
    metrics = [
        *accuracy_metrics(epoch=True, minibatch=True, experience=True, stream=True),
        *loss_metrics(epoch=True, stream=True),
        *forgetting_metrics(experience=True, stream=True),
        *bwt_metrics(experience=True, stream=True),
        TrainedExperienceAccuracy(),
        *more,
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # no loggers
        return EvaluationPlugin(*metrics)


def with_transfer() -> EvaluationPlugin:
    """With a metric that wants the whole stream evaluated, and before the first experience too."""
    return new_evaluator(*forward_transfer_metrics(experience=True, stream=True))


def small(cls: type[AdapterStrategy], model: nn.Module, **options: Any) -> Any:
    """One epoch in batches of six, where anything is trained."""
    trained = {} if cls is SimpleCIL else {"train_epochs": 1}
    return cls(model, **{"train_mb_size": 6, "evaluator": None, **trained, **options})


def state(strategy: Any) -> dict[str, Tensor]:
    """Every tensor of the model."""
    found = dict(strategy.model.state_dict())
    if strategy.model.statistics is not None:
        found |= strategy.model.statistics.tensors()
    return found


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("name", strategies.names())
def test_it_goes_on_as_if_it_had_never_stopped(name: str, backbone: Backbone, tmp_path: Path) -> None:
    """To the last bit of the model, and of every value of every metric, forgetting included."""
    stream = two_experiences()
    options: dict[str, Any] = {"evaluator": with_transfer, "eval_every": 0, "seed": 3, "keys": "prototypes"}
    whole = small(strategies.get(name), backbone(), **options)
    whole.train(stream[0], eval_streams=[stream])
    whole.eval(stream)
    folder = whole.save(tmp_path / "saved")
    torch.manual_seed(77)
    rest: Any = strategies.get(name).load(folder, backbone(), evaluator=with_transfer)
    assert vars(rest.clock) == vars(whole.clock)
    assert rest.config == whole.config
    assert repr(rest.evaluator.get_all_metrics()) == repr(whole.evaluator.get_all_metrics())
    rest.recall(stream[:1])
    last = []
    for each in (whole, rest):
        each.train(stream[1], eval_streams=[stream])
        last.append(each.eval(stream))
    assert same(state(whole), state(rest))
    assert vars(rest.clock) == vars(whole.clock)
    assert repr(last[0]) == repr(last[1])
    assert repr(rest.evaluator.get_all_metrics()) == repr(whole.evaluator.get_all_metrics())
    (forgotten,) = [key for key in last[1] if key.startswith("ExperienceForgetting") and key.endswith("Exp000")]
    before = whole.evaluator.metrics[6].forgetting
    assert last[1][forgotten] == before.initial[0] - before.last[0]


def test_what_is_on_disk(backbone: Backbone, tmp_path: Path) -> None:
    strategy = small(MOS, backbone(), plugins=[Counts()])
    strategy.train(two_experiences()[0])
    folder = strategy.save(tmp_path / "saved")
    assert sorted(path.name for path in folder.iterdir()) == ["model", "state.safetensors", "strategy.json"]
    assert {path.suffix for path in folder.rglob("*") if path.is_file()} == {".json", ".safetensors"}
    assert load_file(folder / "state.safetensors").keys() == {"plugins.0.sums"}


RESUME = """
import sys
from pathlib import Path
from safetensors.torch import save_file
from avalanche.training.plugins import EvaluationPlugin
from cl_adapters.model.facade import AdapterModel
from cl_adapters.strategies import LAE

root = Path(sys.argv[1])
sys.path.insert(0, sys.argv[2])  # Avalanche brings a package of the name "tests"
from streams import two_experiences

strategy = LAE.load(root / "saved", evaluator=EvaluationPlugin())
strategy.train(two_experiences(32)[1])
save_file({key: value.contiguous() for key, value in strategy.model.bank.state_dict().items()}, root / "x.safetensors")
print(strategy.clock.train_iterations)
"""


def test_another_process_goes_on_too(tmp_path: Path, repo_root: Path) -> None:
    stream = two_experiences(32)
    strategy = small(LAE, FrozenBackbone.load("vit_glyph_tiny"))
    strategy.train(stream[0])
    strategy.save(tmp_path / "saved")
    strategy.train(stream[1])
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", RESUME, str(tmp_path), str(Path(__file__).parent)],
        capture_output=True,
        text=True,
        check=False,
        timeout=200,
        env=os.environ | {"PYTHONPATH": str(repo_root)},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split()[-1] == str(strategy.clock.train_iterations)
    assert same(load_file(tmp_path / "x.safetensors"), dict(strategy.model.bank.state_dict()))


def test_settings_of_later_go_along(backbone: Backbone, tmp_path: Path) -> None:
    strategy = small(
        Sequential, backbone(), eval_every=2, peval_mode="iteration", class_names={0: "zero"}, seed=2**64 - 1
    )
    strategy.train_epochs, strategy.train_mb_size = 3, 4
    loaded = Sequential.load(strategy.save(tmp_path / "saved"), backbone(), evaluator=None)
    assert loaded.config == strategy.config
    assert (loaded.train_epochs, loaded.train_mb_size, loaded.eval_every) == (3, 4, 2)
    assert (loaded.seed, loaded.model.class_names) == (2**64 - 1, {0: "zero"})


def test_the_predictor_that_was_given_goes_along(backbone: Backbone, tmp_path: Path) -> None:
    stream = two_experiences()
    strategy = small(MOS, backbone(), keys="prototypes", predictor={"type": "nearest_key"})
    strategy.train(stream[0])
    loaded: Any = MOS.load(strategy.save(tmp_path / "saved"), backbone(), evaluator=None)
    loaded.train(stream[1])
    strategy.train(stream[1])
    assert loaded.model.predictor == strategy.model.predictor
    assert "NearestKey" in repr(loaded.model.predictor)


def test_task_labels_are_known_at_once_and_recall_changes_nothing(backbone: Backbone, tmp_path: Path) -> None:
    data = two_experiences()[0].dataset
    train = list(nc_benchmark(data, data, n_experiences=2, task_labels=True, shuffle=False).train_stream)
    for cls in (MOS, Joint):
        strategy = small(cls, backbone(), task_incremental=True, evaluator=new_evaluator)
        strategy.train(train[0])
        folder = strategy.save(tmp_path / cls.__name__)
        loaded = cls.load(folder, backbone(), evaluator=new_evaluator)
        assert loaded.task_incremental
        assert repr(loaded.eval(train[:1])) == repr(strategy.eval(train[:1])), "without recall"
        if cls is Joint:
            with pytest.raises(ClAdaptersError, match="recall"):
                loaded.train(train[1])
        loaded.recall(train[:1])
        for each in (loaded, strategy):
            each.train(train[1])
        assert repr(loaded.eval(train)) == repr(strategy.eval(train))


# --- objects -----------------------------------------------------------------------------------------------------


class Counts(Plugin[Any]):
    """Steps, and the sum of the logits."""

    def __init__(self) -> None:
        super().__init__()
        self.steps, self.sums = 0, torch.zeros(2)

    def after_training_iteration(self, strategy: Any, **_: Any) -> None:
        self.steps += 1
        self.sums = self.sums + float(strategy.loss)

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps, "sums": self.sums, "names": ["a", {"b": None}]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        assert state["names"] == ["a", {"b": None}]
        self.steps, self.sums = state["steps"], state["sums"]


class Silent(Plugin[Any]):
    """Says nothing of itself."""


def test_plugins_with_a_state_dict_go_on(backbone: Backbone, tmp_path: Path) -> None:
    stream = two_experiences()
    strategy = small(MOS, backbone(), plugins=[Counts()])
    strategy.train(stream[0])
    folder = strategy.save(tmp_path / "saved")
    counts = Counts()
    loaded = MOS.load(folder, backbone(), plugins=[counts], evaluator=None)
    for each in (strategy, loaded):
        each.train(stream[1])
    assert counts.steps == strategy.plugins[0].steps == 4
    assert torch.equal(counts.sums, strategy.plugins[0].sums)


@pytest.mark.parametrize("value", [{1}, {1: 2}, (1, 2), float("nan"), [torch.zeros(1)]])
def test_a_state_that_needs_a_pickle_is_refused(value: Any, backbone: Backbone, tmp_path: Path) -> None:
    plugin = Counts()
    plugin.state_dict = lambda: {"x": value}  # type: ignore[method-assign]
    with pytest.raises(ConfigError, match="state_dict of Counts has more than a file without pickle holds"):
        small(MOS, backbone(), plugins=[plugin]).save(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_who_does_not_say_what_it_keeps_is_named(backbone: Backbone, tmp_path: Path) -> None:
    class Own(TrainedExperienceAccuracy):
        """It keeps what its parent keeps."""

    class Unknown(type(accuracy_metrics(stream=True)[0])):  # type: ignore[misc]
        """Nobody knows."""

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        evaluator = EvaluationPlugin(Own(), Unknown())
    strategy = small(MOS, backbone(), plugins=[Silent()], evaluator=evaluator)
    with pytest.warns(UserWarning, match="what (Silent|Unknown) counts is not saved") as found:
        strategy.save(tmp_path / "saved")
    assert len(found) == 2
    assert found[0].filename == __file__
    quiet = [LRSchedulerPlugin(LinearLR(optimizer := AdamW([torch.zeros(1)])))], optimizer
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        small(MOS, backbone(), optimizer=quiet[1], plugins=quiet[0]).save(tmp_path / "quiet")
        early: Any = [EarlyStoppingPlugin(1, "train_stream")]
        small(MOS, backbone(), plugins=early, evaluator=new_evaluator, eval_every=1).save(tmp_path / "early")


def test_replay_is_refused_by_name(backbone: Backbone, tmp_path: Path) -> None:
    class Mine(ReplayPlugin):
        """Mine."""

    for plugin in (ReplayPlugin(mem_size=4), Mine(mem_size=4)):
        strategy = small(MOS, backbone(), plugins=[plugin])
        with pytest.raises(ConfigError, match=rf"{type(plugin).__name__} keeps samples.*strategy.model.save\(folder\)"):
            strategy.save(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_the_plugins_have_to_be_given_again(backbone: Backbone, tmp_path: Path) -> None:
    folder = small(MOS, backbone(), plugins=[Counts()]).save(tmp_path / "saved")
    for plugins in ([], [Silent()], [Counts(), Counts()]):
        with pytest.raises(ConfigError, match=r"saved with the plugins \[Counts\]: give new ones"):
            MOS.load(folder, backbone(), plugins=plugins)


def test_the_recipe_has_to_be_given_again(backbone: Backbone, tmp_path: Path) -> None:
    stream = two_experiences()
    recipe: dict[str, Any] = {
        "optimizer": partial(AdamW, lr=0.002, weight_decay=0.1),
        "criterion": nn.CrossEntropyLoss(label_smoothing=0.1),
        "scheduler": partial(CosineAnnealingLR, T_max=2),
    }
    strategy = small(MOS, backbone(), **recipe, train_epochs=2)
    strategy.train(stream[0])
    folder = strategy.save(tmp_path / "saved")
    loaded = MOS.load(folder, backbone(), evaluator=None, **recipe)
    for each in (strategy, loaded):
        each.train(stream[1])
    assert same(state(strategy), state(loaded))
    for key, then in (("optimizer", "AdamW"), ("criterion", "CrossEntropyLoss"), ("scheduler", "CosineAnnealingLR")):
        others = {name: value for name, value in recipe.items() if name != key}
        with pytest.raises(
            ConfigError, match=rf"saved with {key}= a {then}: give it again, MOS.load\(..., {key}=...\)"
        ):
            MOS.load(folder, backbone(), **others)
    with pytest.raises(ConfigError, match="saved with optimizer= a AdamW, not a SGD"):
        MOS.load(folder, backbone(), **recipe | {"optimizer": partial(torch.optim.SGD, lr=0.1)})
    plain = small(MOS, backbone()).save(tmp_path / "plain")
    with pytest.raises(ConfigError, match="saved with the method's own optimizer: leave optimizer= out"):
        MOS.load(plain, backbone(), optimizer=AdamW)


def test_metrics_that_do_not_meet_are_named(backbone: Backbone, tmp_path: Path) -> None:
    def evaluator(*metrics: Any) -> EvaluationPlugin:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return EvaluationPlugin(*metrics)

    strategy = small(MOS, backbone(), evaluator=evaluator(forgetting_metrics(stream=True)))
    folder = strategy.save(tmp_path / "saved")
    with pytest.warns(UserWarning, match="StreamForgetting is not in this evaluator"):
        MOS.load(folder, backbone(), evaluator=None)
    plain = small(MOS, backbone()).save(tmp_path / "plain")
    with pytest.warns(UserWarning, match="StreamForgetting was not in the evaluator that was saved, and begins anew"):
        MOS.load(plain, backbone(), evaluator=evaluator(forgetting_metrics(stream=True)))


def test_values_that_are_no_numbers_are_named(backbone: Backbone, tmp_path: Path) -> None:
    strategy = small(MOS, backbone())
    for name, value in {"picture": torch.zeros(2), "lost": float("nan"), "far": float("-inf"), "count": 3}.items():
        strategy.evaluator.last_metric_results[name] = value
        strategy.evaluator.all_metric_results[name] = ([0], [value])
    with pytest.warns(UserWarning, match="values that are no numbers are not saved: picture"):
        folder = strategy.save(tmp_path / "saved")
    loaded = MOS.load(folder, backbone(), evaluator=None)
    assert repr(loaded.evaluator.last_metric_results) == "{'lost': nan, 'far': -inf, 'count': 3}"
    assert repr(loaded.evaluator.all_metric_results["lost"]) == "([0], [nan])"


# --- refusals ----------------------------------------------------------------------------------------------------


def test_another_class_is_refused_by_name(backbone: Backbone, tmp_path: Path) -> None:
    folder = small(LAE, backbone()).save(tmp_path / "saved")
    with pytest.raises(ConfigError, match=r"holds a LAE, no MOS: load it with LAE.load\(...\)"):
        MOS.load(folder, backbone())
    with pytest.raises(ConfigError, match=r"load it with LAE.load"):
        AdapterStrategy.load(folder, backbone())


def test_only_a_saved_strategy_is_replaced(backbone: Backbone, tmp_path: Path) -> None:
    strategy = small(MOS, backbone())
    folder = strategy.save(tmp_path / "saved")
    before = (folder / "strategy.json").read_bytes()
    with pytest.raises(StorageError, match="exists already"):
        strategy.save(folder)
    assert (folder / "strategy.json").read_bytes() == before
    strategy.train(two_experiences()[0])
    strategy.save(folder, overwrite=True)
    assert MOS.load(folder, backbone(), evaluator=None).clock.train_exp_counter == 1
    model = strategy.model.save(tmp_path / "model")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "strategy.json").write_text("{}")
    for other in (model, tmp_path / "mine"):
        names = sorted(path.name for path in other.iterdir())
        with pytest.raises(StorageError, match="overwrite=True replaces only what was saved there in the same form"):
            strategy.save(other, overwrite=True)
        assert sorted(path.name for path in other.iterdir()) == names
    with pytest.raises(StorageError, match="holds a model alone"):
        MOS.load(model, backbone())
    with pytest.raises(StorageError, match="no saved strategy"):
        MOS.load(tmp_path / "nowhere", backbone())


def test_it_is_not_saved_while_it_runs(backbone: Backbone, tmp_path: Path) -> None:
    class Saves(Plugin[Any]):
        def after_training_exp(self, strategy: Any, **_: Any) -> None:
            strategy.save(tmp_path / "saved")

    stream = two_experiences()
    strategy = small(MOS, backbone(), plugins=[saves := Saves()])
    with pytest.raises(ClAdaptersError, match="between calls of train and eval"):
        strategy.train(stream[0])
    strategy.plugins.remove(saves)
    strategy.save(tmp_path / "after")


def test_a_model_of_a_pool_is_refused_as_in_training(backbone: Backbone, tmp_path: Path) -> None:
    strategy = small(MOS, backbone())
    strategy.train(two_experiences()[0])
    strategy.save_pool(tmp_path / "pool")
    model = AdapterModel.from_pool(tmp_path / "pool", backbone=backbone())
    with pytest.raises(ClAdaptersError, match="made from a pool"):
        small(MOS, model).save(tmp_path / "saved")


EDITS: dict[str, Any] = {
    "strategy": "MOS; import os",
    "seed": "1x",
    "config": {"lr": -1},
    "task_classes": [[0, [10**12]]],
    "predictor": {"type": "none"},
    "train_mb_size": 0,
    "peval_mode": "never",
    "clock": {"train_iterations": -1},
    "curves": {"x": {"x": [1], "y": []}},
    "last": {"x": True},
    "metrics": [{"name": "StreamForgetting", "state": {"experience": "0", "initial": [], "last": []}}],
    "plugins": [{"name": "Counts", "state": {}, "tensors": ["sums"]}],
    "files": {"../x": "0" * 64},
    "schema_version": 2,
}


@pytest.mark.parametrize("key", EDITS)
def test_each_value_is_checked(key: str, backbone: Backbone, tmp_path: Path) -> None:
    """Also where somebody computed the digest anew."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        evaluator = EvaluationPlugin(forgetting_metrics(stream=True))
    strategy = small(MOS, backbone(), evaluator=evaluator)
    strategy.train(two_experiences()[0])
    file = strategy.save(tmp_path / "saved") / "strategy.json"
    content = json.loads(file.read_text())
    del content["sha256"]
    value = content[key] | EDITS[key] if key in ("config", "clock") else EDITS[key]
    file.write_text(json.dumps(sealed(content | {key: value})))
    with pytest.raises(StorageError, match=re.escape(str(file)) if key != "schema_version" else "upgrade"):
        MOS.load(tmp_path / "saved", backbone(), evaluator=evaluator, plugins=[Counts()] if key == "plugins" else [])


def test_files_of_two_saves_are_not_mixed(backbone: Backbone, tmp_path: Path) -> None:
    strategy = small(MOS, backbone(), plugins=[Counts()])
    one = strategy.save(tmp_path / "one")
    strategy.train(two_experiences()[0])
    two = strategy.save(tmp_path / "two")
    (two / "model").rename(tmp_path / "away")
    (one / "model").rename(two / "model")
    with pytest.raises(StorageError, match=r"model.json is not the one that strategy.json belongs to"):
        MOS.load(two, backbone(), plugins=[Counts()])
    (two / "model").rename(one / "model")
    (tmp_path / "away").rename(two / "model")
    (one / "state.safetensors").replace(two / "state.safetensors")
    with pytest.raises(StorageError, match="SHA-256"):
        MOS.load(two, backbone(), plugins=[Counts()])


# --- Avalanche's own checkpoints ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*strategies.names(), "own recipe", "replay"])
def test_a_checkpoint_of_avalanche_goes_on_too(name: str, backbone: Backbone, tmp_path: Path) -> None:
    """By dill: torch hides the modules of its optimizers from it, so that it fails without our help."""
    for module in ("sgd", "adam", "adamw"):  # as in a new process
        vars(torch.optim).pop(module, None)
    stream = two_experiences()
    options: dict[str, Any] = {"evaluator": new_evaluator}
    if name == "own recipe":
        optimizer = AdamW([torch.zeros(1)], lr=0.002)
        options |= {"optimizer": optimizer, "plugins": [LRSchedulerPlugin(LinearLR(optimizer))]}
    if name == "replay":
        options |= {"plugins": [ReplayPlugin(mem_size=4)]}
    cls = strategies.get(name) if name in strategies.names() else MOS
    strategy = small(cls, backbone(), **options)
    strategy.train(stream[0])
    save_checkpoint(strategy, str(tmp_path / "checkpoint.pkl"))
    loaded, experiences = maybe_load_checkpoint(small(cls, backbone(), **options), str(tmp_path / "checkpoint.pkl"))
    assert experiences == 1
    for each in (strategy, loaded):
        each.train(stream[1])
    assert same(state(strategy), state(loaded))
    assert repr(loaded.eval(stream)) == repr(strategy.eval(stream))
