"""AdapterStrategy: what every strategy shares.

A strategy answers four questions: what grows for an experience, what is trained in which phase, what is
consolidated afterwards, and how one predicts.
"""

from __future__ import annotations

import inspect
import warnings
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from avalanche.core import BasePlugin
from avalanche.training.plugins import EvaluationPlugin
from avalanche.training.plugins.evaluation import default_evaluator
from torch import Tensor, nn

from cl_adapters._seeding import derive, generator
from cl_adapters._timing import Stopwatch
from cl_adapters.backbones.frozen import FrozenBackbone
from cl_adapters.bank.bank import AdapterBank, Routes
from cl_adapters.errors import DataError
from cl_adapters.model.facade import AdapterModel
from cl_adapters.model.state import Origin
from cl_adapters.parts.keys import KeysConfig, Kind
from cl_adapters.predictors.base import Predictor, predictor_from
from cl_adapters.registry import Registry
from cl_adapters.strategies._loop.activation_cache import Views
from cl_adapters.strategies._loop.order import reading_loader
from cl_adapters.strategies.config import StrategyConfig, TrainingConfig, resolve
from cl_adapters.strategies.lifecycle import LifeCycle
from cl_adapters.strategies.lookup import begin_keys, usable
from cl_adapters.strategies.phases import Phase

if TYPE_CHECKING:
    from cl_adapters.pool import AdapterPool


class AdapterStrategy(LifeCycle):
    """Base of the strategies; an Avalanche strategy with ``train(experience)`` and ``eval(stream)``.

    Args:
        model: a :class:`FrozenBackbone`, your own ``nn.Module`` (it is wrapped), or an :class:`AdapterModel` that
            this strategy made before.
        seed: of everything random. The result is a function of the seed and the order of the experiences alone:
            evaluations in between, or the random state around it, change nothing.
        config: settings; default the strategy's own.
        device: where to compute.
        plugins, evaluator, eval_every, peval_mode: as in Avalanche.
        class_names: class label to name, recorded with the model.
        progress: called as (phase name, steps done, steps in all) during long work.
        keys: after every task keep keys of its classes, by which inputs can be looked up without training (the model's
            part "class_keys"); costs one more pass over the images. A model that has keys goes on with them.
        inference: another inference rule after every task than the strategy's own: a predictor, its name, or a mapping
            with "type" and its options; those that retrieve need ``keys``.
        options: single fields of ``config`` by name, for instance ``train_epochs=10``.

    Attributes:
        config: the resolved settings.
        model: the :class:`AdapterModel`.
        timings: seconds of "train", "statistics", "alignment" and "eval".
        trainable_parameters: numbers trained at once in the newest task.
        expansions: adapters that the newest call of ``train`` added because the data asked for them.
    """

    Config: ClassVar[type[StrategyConfig]] = StrategyConfig
    summary: ClassVar[str] = ""
    frozen_after_task: ClassVar[bool] = True
    """Whether an adapter never changes after its task: then evaluations may reuse features."""
    retrieves: ClassVar[bool] = False
    """Whether each task has adapters of its own, one of which is chosen for an image: then the choice can be judged."""
    expands: ClassVar[bool] = False
    """Whether the data decide how many adapters there are; ``expansions`` then says which were added and why."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        _own_check_only(cls)
        own = [p for p in inspect.signature(AdapterStrategy.__init__).parameters.values() if p.name != "options"]
        fields = inspect.signature(cls.Config).parameters.values()
        cls.__signature__ = inspect.Signature([*own[1:], *fields])

    def __init__(
        self,
        *,
        model: nn.Module,
        seed: int = 0,
        config: StrategyConfig | None = None,
        device: str | torch.device = "cpu",
        plugins: Sequence[BasePlugin] | None = None,
        evaluator: EvaluationPlugin | Callable[[], EvaluationPlugin] | None = default_evaluator,
        eval_every: int = -1,
        peval_mode: str = "epoch",
        class_names: Mapping[int, str] | None = None,
        progress: Callable[[str, int, int], None] | None = None,
        keys: KeysConfig | Kind | None = None,
        inference: Predictor | str | Mapping[str, Any] | None = None,
        **options: Any,
    ) -> None:
        self.config = resolve(
            type(self).__name__, self.Config, config, options, list(type(self).__signature__.parameters)
        )
        device = torch.device(device)
        if not isinstance(model, AdapterModel):
            model = self.new_model(FrozenBackbone.wrap(model).to(device))
        model.class_names.update(class_names or {})
        begin_keys(model, None if keys is None else KeysConfig.of(keys))
        self.inference = None if inference is None else usable(predictor_from(inference), model)
        super().__init__(
            model=model.to(device),
            optimizer=self._new_optimizer(),
            train_mb_size=self.config.train_mb_size,
            train_epochs=getattr(self.config, "train_epochs", 0),
            eval_mb_size=self.config.eval_mb_size,
            device=device,
            plugins=plugins,
            evaluator=_without_metrics() if evaluator is None else evaluator,
            eval_every=eval_every,
            peval_mode=peval_mode,
        )
        self.seed = seed
        self.timings = Stopwatch()
        self.progress = progress
        self.trainable_parameters = 0
        self.expansions = []
        self._unfinished = False
        self._phase = None
        self._features = None
        self._noise = None
        self._loader_options: dict[str, Any] = {}
        self._visits = 0
        self._views = None
        if getattr(self.config, "cached_views", 0):
            model.backbone.check_resumable()

    # --- the four questions --------------------------------------------------------------------------------------

    def new_model(self, backbone: FrozenBackbone) -> AdapterModel:
        """The model before the first task."""
        if not isinstance(self.config, TrainingConfig):
            return AdapterModel(backbone)
        return AdapterModel(backbone, AdapterBank(backbone, self.config.adapter, self.config.blocks))

    @abstractmethod
    def grow(self, task: int) -> None:
        """Add what task ``task`` (0-based) needs; the model has its new columns already."""

    @abstractmethod
    def phases(self, task: int) -> Iterable[Phase]:
        """The training loops of this task, in order."""

    @abstractmethod
    def consolidate(self, task: int) -> None:
        """After the phases: merge, freeze, statistics, alignment, prototypes."""

    @abstractmethod
    def predictor(self, task: int, training: bool) -> Predictor:
        """The inference rule after task ``task``, or while it is still in training."""

    def routes(self) -> Routes | None:
        """The adapters of the forward pass in training."""
        return None

    def before_epoch(self, epoch: int) -> None:
        """Called before every training epoch (0-based in its phase)."""

    def before_pass(self) -> None:
        """Called before every training forward."""

    def before_step(self) -> None:
        """Called between backward and the optimizer's step."""

    def after_step(self) -> None:
        """Called after the optimizer's step."""

    def origin(self, slot: int) -> Origin:
        """What an adapter was made of besides its own images; default nothing."""
        return Origin()

    def recall(self, experiences: Iterable[Any]) -> None:
        """On resume: given the experiences of finished tasks, for strategies that keep their data."""

    # --- helpers for subclasses ----------------------------------------------------------------------------------

    @property
    def task(self) -> int:
        """Index of the newest task."""
        return int(self.model.num_tasks) - 1

    def generator(self, purpose: str, task: int) -> torch.Generator:
        """A fresh CPU generator for one purpose in one task."""
        return generator(self.seed, purpose, task)

    def training_features(self, routes: Routes | None) -> tuple[Tensor, Tensor]:
        """Features of the experience's training images without augmentation.

        Returns:
            float32 [N, D] on the CPU, and the column of each sample, int64 [N].

        Raises:
            DataError: a feature is not a finite number.
        """
        workers = self._loader_options.get("num_workers", 0)
        loader, back_N = reading_loader(self.experience.dataset.eval(), self.config.eval_mb_size, workers)
        features, labels = [], []
        with torch.inference_mode():
            for x, y, *_ in loader:
                features.append(self.model.features(x.to(self.device), routes).float().cpu())
                labels.append(torch.as_tensor(y))
        if not all(f_BD.isfinite().all() for f_BD in features):
            raise DataError("features of the training images are not finite: check the images and the learning rate")
        # out of inference mode, so that later code may save or differentiate through what is built from them
        return torch.cat(features)[back_N].clone(), self.model.columns_of(torch.cat(labels)[back_N])

    def next_order(self) -> torch.Generator:
        """The generator that shuffles the next pass over this task's images."""
        self._visits += 1
        return self.generator(f"order {self._visits}", self.task)

    def views(self) -> Views | None:
        """The cached views of this task's images; None where caching is off or a plugin supplies the data."""
        config = self.config
        if not isinstance(config, TrainingConfig) or not config.cached_views or self._images is not self._own_images:
            return None
        if self._views is None:
            self._views = Views(
                self.model,
                self.adapted_dataset,
                seeds=[derive(self.seed, "view", self.task, view) for view in range(config.cached_views)],
                batch=config.eval_mb_size,
                memory_mb=config.cache_memory_mb,
                num_workers=self._loader_options.get("num_workers", 0),
            )
        return self._views

    def per_class(self, f_ND: Tensor, columns_N: Tensor) -> list[Tensor]:
        """The features [N_c, D] of each class of the newest task, in column order."""
        first = int((self.model.task_of_column < self.task).sum())
        return [f_ND[columns_N == column] for column in range(first, len(self.model.classes))]

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
            ClAdaptersError: a task is half trained.
        """
        self._check_finished()
        model: AdapterModel = self.model
        return model.save_pool(path, tags=tags, benchmark=benchmark, metrics=metrics, compression=compression)

    def _new_optimizer(self) -> torch.optim.Optimizer:
        """An optimizer whose parameters each phase replaces; torch refuses an empty one."""
        placeholder = nn.Parameter(torch.zeros(1), requires_grad=False)
        return torch.optim.SGD([placeholder], lr=1.0, momentum=getattr(self.config, "momentum", 0.0))


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
