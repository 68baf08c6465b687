"""AdapterStrategy: a method as an Avalanche strategy, from its constructor to the folder in which it is kept.

What a method answers is in :mod:`cl_adapters.strategies.method`; how that is carried out, in ``_loop.trainer``.
"""

from __future__ import annotations

import inspect
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from avalanche.core import BasePlugin
from avalanche.training.plugins import EvaluationPlugin
from avalanche.training.plugins.evaluation import default_evaluator
from torch import nn
from torch.optim import Optimizer

from cl_adapters._timing import Stopwatch
from cl_adapters.backbones.frozen import FrozenBackbone
from cl_adapters.config import renamed_keyword
from cl_adapters.errors import ClAdaptersError, ConfigError
from cl_adapters.model.facade import AdapterModel
from cl_adapters.parts.keys import CLASS_KEYS, Keys, KeysConfig, Kind
from cl_adapters.predictors.base import Predictor, predictor_from
from cl_adapters.registry import Registry
from cl_adapters.strategies._loop.by_label import ByLabel
from cl_adapters.strategies._loop.early_stopping import check_early_stopping
from cl_adapters.strategies._loop.image_plugins import check_image_plugins
from cl_adapters.strategies._loop.plugins import check_plugins
from cl_adapters.strategies._loop.saving import load_strategy, save_strategy
from cl_adapters.strategies._loop.task_labels import TaskClasses
from cl_adapters.strategies._loop.trainer import Trainer
from cl_adapters.strategies.config import OptimizerName, StrategyConfig, TrainingConfig, resolve
from cl_adapters.strategies.method import Expansion, Returning
from cl_adapters.strategies.recipe import (
    Criterion,
    Dial,
    MakeOptimizer,
    MakeScheduler,
    Schedules,
    check_criterion,
    check_unused,
    own_optimizer,
)

if TYPE_CHECKING:
    from cl_adapters.pool import AdapterPool

__all__ = ["AdapterStrategy", "Expansion", "Returning", "strategies"]

S = TypeVar("S", bound="AdapterStrategy")


class AdapterStrategy(Trainer):
    """Base of the strategies; an Avalanche strategy with ``train(experience)`` and ``eval(stream)``.

    Args:
        model: a :class:`FrozenBackbone`, your own ``nn.Module`` (it is wrapped), or an :class:`AdapterModel` that
            this strategy made before.
        optimizer: instead of the method's: an optimizer, its class, or a function that makes one from parameters. Its
            class and settings are taken in every phase; which parameters are trained stays the method's matter. A name
            is the field ``optimizer`` of ``config``.
        criterion: instead of cross-entropy, on the logits of the columns that the method trains, such as
            ``torch.nn.CrossEntropyLoss(label_smoothing=0.1)``.
        scheduler: makes a schedule of torch from an optimizer; it is stepped after every epoch, begins anew in every
            phase, and takes the place of the method's. Others: ``LRSchedulerPlugin`` on the ``optimizer`` given here.
        seed: of everything random. The result is a function of the seed and the order of the experiences alone:
            evaluations in between, or the random state around it, change nothing. Default the seed of torch's global
            generator, which ``RNGManager.set_random_seeds`` and ``torch.manual_seed`` set: strategies made without
            seeding anew share it. Where nobody has seeded, torch has drawn one, another in every process.
        config: settings; default the strategy's own.
        device: where to compute.
        plugins, evaluator, eval_every, peval_mode: as in Avalanche. Plugins that are added to ``strategy.plugins``
            later are looked at when ``train`` is called.
        task_incremental: the task label of a test sample restricts the answer to the classes of that task. Without it
            task labels are ignored, with a warning.
        class_names: class label to name, recorded with the model.
        progress: called as (phase name, steps done, steps in all) during long work.
        keys: after every task keep keys of its classes, by which inputs can be looked up without training (the model's
            part "class_keys"); costs one more pass over the images. A model that has keys goes on with them.
        predictor: another predictor after every task than the strategy's own: an object, its name, or a mapping with
            "type" and its options; those that retrieve need ``keys``. Until version 0.1 this was ``inference``.
        options: single fields of ``config`` by name, for instance ``train_epochs=10``.

    Attributes:
        config: the resolved settings.
        model: the :class:`AdapterModel`.
        seed: the one in use.
        timings: seconds of "train", "statistics", "alignment" and "eval".
        trainable_parameters: at once, the most in the newest task.
        expansions: adapters that the newest call of ``train`` added because the data asked for them.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        _own_check_only(cls)
        own = [p for p in inspect.signature(AdapterStrategy.__init__).parameters.values() if p.name != "options"]
        names = {parameter.name for parameter in own}
        fields = [p for p in inspect.signature(cls.Config).parameters.values() if p.name not in names]
        cls.__signature__ = inspect.Signature([*own[1:], *fields])

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | MakeOptimizer | OptimizerName | None = None,
        criterion: Criterion | None = None,
        *,
        scheduler: MakeScheduler | None = None,
        seed: int | None = None,
        config: StrategyConfig | None = None,
        device: str | torch.device = "cpu",
        plugins: Sequence[BasePlugin] | None = None,
        evaluator: EvaluationPlugin | Callable[[], EvaluationPlugin] | None = default_evaluator,
        eval_every: int = -1,
        peval_mode: str = "epoch",
        task_incremental: bool = False,
        class_names: Mapping[int, str] | None = None,
        progress: Callable[[str, int, int], None] | None = None,
        keys: KeysConfig | Kind | None = None,
        predictor: Predictor | str | Mapping[str, Any] | None = None,
        **options: Any,
    ) -> None:
        if "inference" in options:
            predictor = renamed_keyword("inference", "predictor", options.pop("inference"), predictor)
        if isinstance(optimizer, str) and issubclass(self.Config, TrainingConfig):
            options, optimizer = options | {"optimizer": optimizer}, None
        self.config = resolve(
            type(self).__name__, self.Config, config, options, list(type(self).__signature__.parameters)
        )
        if self.trains:
            check_early_stopping(plugins or (), eval_every, peval_mode, measured=evaluator is not None)
        device = torch.device(device)
        later = self.trains and not self.trains_once
        check_plugins(plugins or (), type(self).__name__, device, trains=self.trains, later=later, expands=self.expands)
        self._bring_recipe(optimizer, scheduler, criterion, plugins or ())
        if not isinstance(model, AdapterModel):
            model = self.new_model(FrozenBackbone.wrap(model).to(device))
        model.class_names.update(class_names or {})
        begin_keys(model, None if keys is None else KeysConfig.of(keys))
        self._given = None if predictor is None else usable(predictor_from(predictor), model)
        super().__init__(
            model=ByLabel.of(model).to(device),
            optimizer=self._new_optimizer() if self._dial is None else self._dial.new_optimizer(),
            criterion=nn.CrossEntropyLoss(label_smoothing=getattr(self.config, "label_smoothing", 0.0))
            if criterion is None
            else criterion,
            train_mb_size=self.config.train_mb_size,
            train_epochs=getattr(self.config, "train_epochs", 0),
            eval_mb_size=self.config.eval_mb_size,
            device=device,
            plugins=plugins,
            evaluator=_without_metrics() if evaluator is None else evaluator,
            eval_every=eval_every,
            peval_mode=peval_mode,
        )
        self.seed = torch.initial_seed() if seed is None else seed
        self.task_incremental = task_incremental
        self._task_classes = TaskClasses()
        self.timings = Stopwatch()
        self.progress = progress
        self.trainable_parameters = 0
        self.expansions = []
        self._loader_options: dict[str, Any] = {}
        if getattr(self.config, "cached_views", 0):
            model.backbone.check_resumable()
            check_image_plugins([*(plugins or ()), *self.evaluator.metrics], type(self).__name__)
        self._checked = list(self.plugins)

    def save_pool(
        self,
        path: str | Path,
        *,
        tags: Sequence[str] = (),
        benchmark: str | None = None,
        metrics: Mapping[int, Mapping[str, float]] | None = None,
        compression: str | None = None,
    ) -> AdapterPool:
        """Write the model as a pool with one record per adapter; see :meth:`AdapterModel.save_pool`.

        Raises:
            ClAdaptersError: a task is in training.
        """
        self._check_between_tasks()
        model: AdapterModel = self.model
        return model.save_pool(path, tags=tags, benchmark=benchmark, metrics=metrics, compression=compression)

    # --- going on later ------------------------------------------------------------------------------------------

    def save(self, path: str | Path, *, overwrite: bool = False) -> Path:
        """Write the strategy as a folder, atomically, from which :meth:`load` goes on as if it had never stopped.

        It holds the model, the settings, Avalanche's clock, the evaluator's curves and what its metrics and the
        plugins keep: Avalanche's forgetting, transfer and accuracies, and whatever has ``state_dict()``, of tensors and
        of what JSON holds, and ``load_state_dict(state)``. Warns of a plugin or metric of which nobody knows whether it
        keeps anything. What one call of ``train`` reports (``expansions``, ``timings``) is not kept, and no data.

        Args:
            path: folder to make.
            overwrite: replace a saved strategy, or an empty folder; nothing else is ever replaced.

        Raises:
            ConfigError: one of Avalanche's plugins keeps what has no place there, such as ``ReplayPlugin`` samples.
            ClAdaptersError: ``train`` or ``eval`` runs, or the model was made from a pool.
            StorageError: the place exists or cannot be written, or a number of the model is not finite.
        """
        self._check_between_tasks()
        self._check_complete()
        if self.timings.running:
            raise ClAdaptersError("a strategy is saved between calls of train and eval, not while they run")
        return save_strategy(self, Path(path), overwrite=overwrite)

    @classmethod
    def load(
        cls: type[S],
        path: str | Path,
        backbone: FrozenBackbone | None = None,
        *,
        optimizer: Optimizer | MakeOptimizer | None = None,
        criterion: Criterion | None = None,
        scheduler: MakeScheduler | None = None,
        device: str | torch.device = "cpu",
        plugins: Sequence[BasePlugin] | None = None,
        evaluator: EvaluationPlugin | Callable[[], EvaluationPlugin] | None = default_evaluator,
        progress: Callable[[str, int, int], None] | None = None,
    ) -> S:
        """Read a folder of :meth:`save`; without a ``backbone`` the recorded one is loaded again by name.

        What was given to the constructor as an object has to be given again, plugins as new ones in the same order.
        Metrics of the evaluator go on where the saved one had them. Strategies that keep the data of finished tasks
        (Joint) want them back by :meth:`recall`.

        Raises:
            StorageError: missing, altered or newer files.
            ConfigError: another class's strategy; an optimizer, criterion, schedule or plugin is missing or another.
            IncompatibleBackbone: not the backbone that the adapters were trained on.
        """
        return load_strategy(
            cls,
            Path(path),
            backbone,
            device=device,
            plugins=plugins or (),
            evaluator=evaluator,
            brought={"optimizer": optimizer, "criterion": criterion, "scheduler": scheduler},
            progress=progress,
        )

    def __getstate__(self) -> dict[str, Any]:
        """For ``avalanche.checkpointing.save_checkpoint``, whose dill looks classes up in modules.

        torch deletes the names of the modules in which its optimizers are, so dill would copy the classes and fail.
        """
        package, _, module = type(self.optimizer).__module__.rpartition(".")
        if package == "torch.optim":
            setattr(torch.optim, module, sys.modules[f"{package}.{module}"])
        return dict(vars(self))

    # --- private -------------------------------------------------------------------------------------------------

    def _bring_recipe(
        self,
        optimizer: Any,
        scheduler: MakeScheduler | None,
        criterion: Criterion | None,
        plugins: Sequence[BasePlugin],
    ) -> None:
        """Take what the user brings.

        Raises:
            ConfigError: it cannot be used, has no effect because nothing is trained, or leaves a setting without one.
        """
        given = {"optimizer": optimizer, "scheduler": scheduler, "criterion": criterion}
        for name, value in given.items():
            if value is not None and not self.trains:
                raise ConfigError(f"{type(self).__name__} trains nothing here, so {name}= has no effect: leave it out")
        self._brought = [name for name, value in given.items() if value is not None]
        self._dial: Dial | None = None
        if optimizer is not None:
            self._dial = Dial.of(optimizer)
            self.config = self._dial.settings(self._training_config())
        elif scheduler is not None:
            own = self._new_optimizer()
            own.param_groups[0]["lr"] = self._training_config().lr
            self._dial = Dial(own)
        self._schedules = Schedules(self._dial, scheduler, plugins)
        if self._schedules:
            check_unused(self.config, "scheduler")
        if criterion is not None:
            check_criterion(criterion)
            check_unused(self.config, "criterion")

    def _new_optimizer(self) -> torch.optim.Optimizer:
        return own_optimizer(self.config)


def begin_keys(model: AdapterModel, config: KeysConfig | None) -> None:
    """Give a model that has learned nothing its keys; check those of one that goes on.

    Raises:
        ConfigError: it has other keys.
        ClAdaptersError: it has learned classes without keys.
    """
    kept = dict(model.parts.items()).get(CLASS_KEYS)
    if isinstance(kept, Keys):
        kept.check_config(config)
    elif config is not None:
        if model.classes:
            raise ClAdaptersError(
                "this model learned classes without keys; keys have to be kept from the first task on"
            )
        model.parts[CLASS_KEYS] = Keys(config, model.backbone.num_features)


def usable(predictor: Predictor, model: AdapterModel) -> Predictor:
    """The predictor, if it will find the keys that it needs.

    Raises:
        ConfigError: the model keeps none.
    """
    if predictor.needs_keys and CLASS_KEYS not in model.parts:
        raise ConfigError(f"{predictor} looks inputs up by keys: pass keys='prototypes' (--keys prototypes) too")
    return predictor


def _without_metrics() -> EvaluationPlugin:
    """An evaluator that measures nothing; who asks for that needs no warning that nothing is logged."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return EvaluationPlugin()


def _own_check_only(cls: type) -> None:
    """Take Avalanche's check of keyword names off a constructor: it knows nothing of the fields of a config."""
    wrapped = vars(cls)["__init__"]
    type.__setattr__(cls, "__init__", wrapped.__wrapped__)


_own_check_only(AdapterStrategy)

strategies: Registry[type[AdapterStrategy]] = Registry(
    "strategy", "cl_adapters.strategies", group="cl_adapters.strategies"
)
