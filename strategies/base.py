"""AdapterStrategy: what every strategy shares.

A strategy answers four questions: what grows for an experience, what is trained in which phase, what is
consolidated afterwards, and how one predicts. Who writes one reads those and the helpers after them; the rest of the
class carries the answers out inside Avalanche's training and evaluation loops.
"""

from __future__ import annotations

import inspect
import math
import sys
import warnings
from abc import abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeVar

import torch
from avalanche.benchmarks.scenarios.online import OnlineCLExperience
from avalanche.core import BasePlugin
from avalanche.training.plugins import EvaluationPlugin, LRSchedulerPlugin
from avalanche.training.plugins.clock import Clock
from avalanche.training.plugins.evaluation import default_evaluator
from avalanche.training.templates import SupervisedTemplate
from avalanche.training.templates.base_sgd import PeriodicEval
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from cl_adapters._precision import uncached_autocast
from cl_adapters._seeding import derive, generator, isolated, seed_globals
from cl_adapters._timing import Stopwatch
from cl_adapters.backbones.frozen import FrozenBackbone
from cl_adapters.backbones.inputs import to_device
from cl_adapters.bank.bank import AdapterBank, Routes
from cl_adapters.config import build, renamed_keyword, to_plain
from cl_adapters.errors import ClAdaptersError, ConfigError, DataError, TrainingDiverged
from cl_adapters.model.facade import AdapterModel
from cl_adapters.model.heads import Init, PrototypeHead
from cl_adapters.model.state import Origin
from cl_adapters.parts.keys import CLASS_KEYS, Keys, KeysConfig, Kind
from cl_adapters.predictors.base import Predictor, predictor_from
from cl_adapters.registry import Registry
from cl_adapters.strategies._loop.activation_cache import ActivationCache, CachedLoader
from cl_adapters.strategies._loop.batches import check_first, on_device, sample_batch
from cl_adapters.strategies._loop.by_label import WIDEST, ByLabel, Pass
from cl_adapters.strategies._loop.early_stopping import begin_early_stopping, check_early_stopping
from cl_adapters.strategies._loop.experiences import check_experience, experience_classes
from cl_adapters.strategies._loop.image_plugins import check_image_plugins
from cl_adapters.strategies._loop.order import (
    Persistent,
    check_loader_options,
    collate_of,
    lengths_of,
    reading_loader,
    training_loader,
)
from cl_adapters.strategies._loop.plugins import check_plugins, check_task_labels
from cl_adapters.strategies._loop.saving import load_strategy, save_strategy
from cl_adapters.strategies._loop.snapshot import Snapshot
from cl_adapters.strategies._loop.task_labels import TaskClasses
from cl_adapters.strategies.config import OptimizerName, StrategyConfig, TrainingConfig, resolve
from cl_adapters.strategies.phases import Batch, Loss, ParamGroup, Phase, Schedule
from cl_adapters.strategies.recipe import (
    Criterion,
    Dial,
    MakeOptimizer,
    MakeScheduler,
    Pace,
    Schedules,
    check_criterion,
    check_unused,
    own_optimizer,
)

if TYPE_CHECKING:
    from cl_adapters.pool import AdapterPool

Returning = Literal["refused", "taken", "merged"]
"""Classes that were learned before are refused; or taken, where ``returning`` says all that is needed of them; or their
means are merged by the number of samples so far (``keep_means``)."""
S = TypeVar("S", bound="AdapterStrategy")


@dataclass(frozen=True, kw_only=True)
class Expansion:
    """One adapter added at one block during a task, and what made the strategy add it.

    Attributes:
        task: task (0-based) in which it was added.
        block: block (0-based from the input) that got it.
        slot: its slot in the bank.
        score: how new the data looked to this block; the block expands where it exceeds ``threshold``.
        threshold: the limit.
        scan: pass over the task's data in which it happened (0-based): each pass may find more to add.
        batch: batch of that pass (0-based).
    """

    task: int
    block: int
    slot: int
    score: float
    threshold: float
    scan: int
    batch: int


class AdapterStrategy(SupervisedTemplate):
    """Base of the strategies; an Avalanche strategy with ``train(experience)`` and ``eval(stream)``.

    ``phases`` is consumed lazily: each phase is asked for only when the one before has ended, so that a generator may
    look at what was trained, freeze it, and decide what comes next.

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

    Config: ClassVar[type[StrategyConfig]] = StrategyConfig
    summary: ClassVar[str] = ""
    frozen_after_task: ClassVar[bool] = True
    """Whether an adapter never changes after its task: then evaluations may reuse features."""
    retrieves: ClassVar[bool] = False
    """Whether each task has adapters of its own, one of which is chosen for an image: then the choice can be judged."""
    expands: ClassVar[bool] = False
    """Whether the data decide how many adapters there are; ``expansions`` then says which were added and why."""
    trains_once: ClassVar[bool] = False
    """Whether nothing is trained by gradients after the first task: then there is nothing to protect."""
    first_task_adapts: ClassVar[bool] = False
    """Whether the first task decides what is adapted: then a first experience of a few images is warned of."""
    classes_return: ClassVar[Returning] = "refused"
    """What becomes of classes that were learned before."""
    explicit_order: ClassVar[bool] = False
    """Whether images are shuffled by the strategy's own generators, as cached activations always are."""

    expansions: list[Expansion]
    _stop_training: bool
    _run: Pass | None = None
    _trained: Mapping[int, nn.Parameter] = MappingProxyType({})
    _snapshot: Snapshot | None = None
    _phase: Phase | None = None
    _pace: Pace | None = None
    _dropout_generator: torch.Generator | None = None
    _cache: ActivationCache | None = None
    _images: Any = None
    _own_images: Any = None
    dataloader: Any
    mbatch: Any
    _visits: int = 0
    _checked: Sequence[BasePlugin] = ()

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
        """The training loops of this task, in order; each is asked for when the one before has ended."""

    @abstractmethod
    def consolidate(self, task: int) -> None:
        """After the phases: merge, freeze, statistics, alignment, prototypes."""

    @abstractmethod
    def predictor(self, task: int, training: bool) -> Predictor:
        """The predictor after task ``task``, or while it is still in training."""

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
        """On resume: given the experiences of finished tasks, for their task labels and, where kept, their data."""
        for experience in experiences:
            self._task_classes.note(experience)

    # --- helpers for subclasses ----------------------------------------------------------------------------------

    @property
    def trains(self) -> bool:
        """Whether anything is trained by gradients with these settings."""
        return isinstance(self.config, TrainingConfig)

    @property
    def train_epochs(self) -> int:
        """Epochs per task; may be set, for the tasks to come.

        Raises:
            ConfigError: set where nothing is trained, or to less than 1.
        """
        return self.config.train_epochs if isinstance(self.config, TrainingConfig) else 0

    @train_epochs.setter
    def train_epochs(self, epochs: int) -> None:
        if epochs == self.train_epochs:
            return
        if not isinstance(self.config, TrainingConfig):
            raise ConfigError(f"{type(self).__name__} trains nothing, so train_epochs has no effect")
        self.config = build(type(self.config), to_plain(self.config) | {"train_epochs": epochs})

    @property
    def task(self) -> int:
        """Index of the newest task."""
        return int(self.model.num_tasks) - 1

    @property
    def known(self) -> int:
        """Columns of the classes of finished tasks."""
        return int((self.model.task_of_column < self.task).sum())

    @property
    def returning(self) -> list[int]:
        """Those of them whose classes are in the newest task again."""
        return [column for column, task in sorted(self.model.returned.items()) if task == self.task]

    @property
    def columns(self) -> list[int]:
        """Columns of the classes of the newest task, rising."""
        return [*self.returning, *range(self.known, len(self.model.classes))]

    def generator(self, purpose: str, task: int) -> torch.Generator:
        """A fresh CPU generator for one purpose in one task."""
        return generator(self.seed, purpose, task)

    def grow_head(self, init: Init | None = None) -> None:
        """Rows in the linear head for the classes that have none yet."""
        new = len(self.model.classes) - self.model.head.num_classes
        if new:
            self.model.head.grow(new, self.generator("head", self.task), init)

    def fresh_adapter(self) -> dict[str, Tensor]:
        """Weights of a new adapter in all blocks of the bank."""
        weights: dict[str, Tensor] = self.model.bank.fresh(self.generator("adapter", self.task))
        return weights

    def head_group(self) -> ParamGroup:
        """The linear head at its own learning rate."""
        config = self._training_config()
        lr = config.lr * config.head_lr_factor
        return ParamGroup(params=list(self.model.head.parameters()), lr=lr, weight_decay=config.weight_decay)

    def adapter_phase(
        self,
        adapter: Sequence[nn.Parameter],
        loss: Loss,
        start: int | None = None,
        schedule: Schedule | None = None,
    ) -> Phase:
        """All epochs of the task on adapter parameters and the linear head.

        ``start`` is the first block in which anything is trained; default the first with adapters. ``schedule`` is
        another than that of the settings.
        """
        config = self._training_config()
        live = ParamGroup(params=adapter, lr=config.lr, weight_decay=config.weight_decay)
        return Phase(
            name="adapter",
            epochs=config.train_epochs,
            groups=(live, self.head_group()),
            loss=loss,
            schedule=schedule,
            start=min(self.model.bank.blocks) if start is None else start,
        )

    def training_features(self, routes: Routes | None) -> tuple[Tensor, Tensor]:
        """Features of the experience's training images without augmentation.

        Returns:
            float32 [N, D] on the CPU, and the column of each sample, int64 [N].

        Raises:
            DataError: a feature is not a finite number, or a sample is of no known class.
        """
        dataset = self.experience.dataset.eval()
        loader, back_N = reading_loader(dataset, self.config.eval_mb_size, self._loader_options)
        features, labels = [], []
        with torch.inference_mode():
            for batch in loader:
                x, labels_B = sample_batch(batch)
                features.append(self.model.features(to_device(x, self.device), routes).float().cpu())
                labels.append(labels_B)
        if not all(f_BD.isfinite().all() for f_BD in features):
            raise DataError("features of the training images are not finite: check the images and the learning rate")
        columns_N = self._known_columns(torch.cat(labels)[back_N])
        self._samples = Counter(columns_N.tolist())
        # out of inference mode, so that later code may save or differentiate through what is built from them
        return torch.cat(features)[back_N].clone(), columns_N

    def next_order(self) -> torch.Generator:
        """The generator that shuffles the next pass over this task's images."""
        self._visits += 1
        return self.generator(f"order {self._visits}", self.task)

    def new_pass(self, batch: int, block: int) -> Iterable[Sequence[Tensor]]:
        """One pass over the task's augmented images in a new order, or over what is cached of them at ``block``."""
        cache = self.activation_cache()
        if cache is not None:
            return CachedLoader(cache, block, self.routes(), batch=batch, draw=self.next_order)
        options = self._loader_options | {"drop_last": False}
        return training_loader(self.adapted_dataset, batch, self.next_order, options)

    def activation_cache(self) -> ActivationCache | None:
        """What is cached of this task's images; None where caching is off or a plugin supplies the data."""
        config = self.config
        if not isinstance(config, TrainingConfig) or not config.cached_views or self._images is not self._own_images:
            return None
        if self._cache is None:
            self._cache = ActivationCache(
                self.model,
                self.adapted_dataset,
                seeds=[derive(self.seed, "view", self.task, view) for view in range(config.cached_views)],
                batch=config.eval_mb_size,
                memory_mb=config.cache_memory_mb,
                options=self._loader_options,
            )
        return self._cache

    def per_class(self, f_ND: Tensor, columns_N: Tensor) -> list[Tensor]:
        """The features [N_c, D] of each class of the newest task, in column order."""
        return [f_ND[columns_N == column] for column in self.columns]

    def keep_means(self, head: PrototypeHead, f_ND: Tensor, columns_N: Tensor) -> None:
        """The mean feature of each class of the newest task: appended, or merged with that of its samples before."""
        returning = self.returning
        features = self.per_class(f_ND, columns_N)
        means = [f_MD.mean(0) for f_MD in features]
        if means[len(returning) :]:
            head.append(torch.stack(means[len(returning) :]))
        if returning:
            sizes = [len(f_MD) for f_MD in features[: len(returning)]]
            shares = [n / (n + self.model.samples[column]) for n, column in zip(sizes, returning, strict=True)]
            head.merge(returning, torch.stack(means[: len(returning)]), torch.tensor(shares, dtype=torch.float64))

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
            ClAdaptersError: ``train`` or ``eval`` runs, a task is half trained, or the model was made from a pool.
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

    # --- Avalanche's loop: a task -------------------------------------------------------------------------------------

    def train(self, experiences: Any, eval_streams: Any = None, **loader_options: Any) -> Any:
        """Learn one experience, or several in order; see Avalanche. Global random states are left as they were.

        An error or interrupt in the middle of an experience puts model and strategy back to what they were before it
        (plugins keep what they have): the same call again, or one with another experience, goes on from there.

        Args:
            experiences: one, or several.
            eval_streams: as in Avalanche.
            loader_options: ``shuffle``, ``drop_last``, ``num_workers``, ``persistent_workers`` and ``pin_memory``. The
                last three change nothing of the result, but that random augmentation draws from generators of the
                workers where there are some.

        Raises:
            ConfigError: another keyword; or a plugin was added to ``plugins`` that cannot work here.
            ClAdaptersError: the model was made from a pool of adapters; or a task is in training.
        """
        self._check_between_tasks()
        self._go_back()  # where going back was itself interrupted
        self._check_complete()
        self._take_plugins()
        check_loader_options(loader_options, f"{type(self).__name__}.train")
        self._loader_options = loader_options
        self.expansions = []
        try:
            with isolated(self.device), uncached_autocast(), self.timings.part("train"):
                return super().train(experiences, eval_streams, **loader_options)
        except BaseException:
            self._go_back()
            raise
        finally:
            self._train_cleanup()
            self._forget_pass()
            self._images = self._own_images = None  # with them end workers that persist
            self._loader_options = {}

    def eval(self, experiences: Any, **loader_options: Any) -> Any:
        """Evaluate; see Avalanche. Changes no tensor of the model and no random state.

        Raises:
            ConfigError: a keyword that is none of the loaders', as for :meth:`train`.
        """
        check_loader_options(loader_options, f"{type(self).__name__}.eval")
        state = self._save_train_state()
        try:
            with isolated(self.device), uncached_autocast(), self.timings.part("eval"):
                return super().eval(experiences, **loader_options)
        except BaseException:
            self._eval_cleanup()
            self._load_train_state(state)
            raise

    def _before_training_exp(self, **kwargs: Any) -> None:
        self._forget_pass()
        backbone = self.model.backbone
        apart = [*backbone.modules(), *backbone.parameters(), self.plugins, self._checked]
        apart.append(self.timings)  # the time it took stays true
        finished = self.model.bank.parameters() if self.model.bank is not None and self.frozen_after_task else ()
        self._snapshot = Snapshot(self, apart, [each for each in finished if not each.requires_grad])
        super()._before_training_exp(**kwargs)

    def train_dataset_adaptation(self, **kwargs: Any) -> None:
        """Check the experience before anything grows, then let Avalanche choose the data."""
        self.model.backbone.check_frozen()
        labels = check_experience(self.experience)
        self.model.check_task(labels)
        self._check_returning(labels)
        self._check_whole()
        with isolated(self.device):
            check_first(self.experience.dataset.eval(), self.model.backbone)
        self._task_classes.check(self.experience, self.task_incremental)
        check_task_labels(self.plugins, type(self).__name__, self.experience.dataset)
        task = self.model.num_tasks
        seed_globals(derive(self.seed, "loader", task))
        super().train_dataset_adaptation(**kwargs)

    def make_train_dataloader(self, **kwargs: Any) -> None:
        """Avalanche's loader, or one in the strategy's own order: always for texts, which it batches by length."""
        self._visits = 0
        data = self.adapted_dataset
        if not self.explicit_order and (lengths_of(data) is None or not kwargs.get("shuffle", True)):
            whole = len(data) >= self.train_mb_size  # the only batch is not left out
            super().make_train_dataloader(**kwargs | {"drop_last": whole and kwargs.get("drop_last", False)})
            loader: Any = self.dataloader
            if type(loader) is DataLoader:  # Avalanche leaves it out, though not in evaluation
                loader.collate_fn = collate_of(data) or loader.collate_fn
            if kwargs.get("persistent_workers") and kwargs.get("num_workers"):
                self.dataloader = Persistent(loader)
        else:
            self.dataloader = training_loader(data, self.train_mb_size, self.next_order, kwargs)
        self._own_images = self.dataloader

    def check_model_and_optimizer(self, **kwargs: Any) -> None:
        """Grow for every experience; Avalanche does so for the first alone of parts that know they belong together."""
        self.model = self.model_adaptation()
        self.make_optimizer(**kwargs)

    def model_adaptation(self, model: Any = None) -> Any:
        """Grow for the experience, in training only: Avalanche calls this in evaluation too.

        Args:
            model: the strategy's own, or None, which means the same.

        Raises:
            ConfigError: another model.
        """
        if model is not None and model is not self.model:
            raise ConfigError(
                f"{type(self).__name__} grows strategy.model alone, got another {type(model).__name__}: make a "
                "strategy of its own for that model"
            )
        if self.is_training:
            labels = experience_classes(self.experience)
            self.model.add_task(labels)
            self._task_classes.note(self.experience)
            self.grow(self.task)
            self.model.assign_new_slots(self.task)
            self.model.predictor = self.predictor(self.task, training=True)
        return self.model

    def make_optimizer(self, **kwargs: Any) -> None:
        """Nothing: each phase installs its own parameters, in place."""
        self.optimized_param_id: dict[str, Any] = {}

    def _train_exp(self, experience: Any, eval_streams: Any = None, **kwargs: Any) -> None:
        self._dropout_generator = generator(self.seed, "dropout", self.task, device=self.device)
        self.trainable_parameters = 0
        self._trained = {}
        self._images = self.dataloader  # a plugin may have put its own
        for phase in self.phases(self.task):
            self._phase = phase
            self.dataloader = self._loader_of(phase)
            phase.install(self.optimizer)
            self.model.trained, self.model.trained_routes = True, self.routes()
            self._trained = {id(p): p for group in phase.groups for p in group.params} | self._trained
            self._schedules.reset()
            begin_early_stopping(self)
            self.trainable_parameters = max(self.trainable_parameters, phase.num_parameters)
            steps = len(self.dataloader)
            self._pace = Pace(phase, self.config, steps)
            for epoch in range(phase.epochs):
                if not self._schedules:
                    self._pace.begin_epoch(self.optimizer, epoch)
                self.before_epoch(epoch)
                self._before_training_epoch(**kwargs)
                if self._stop_training:
                    self._stop_training = False
                    break
                self.training_epoch(**kwargs)
                self._after_training_epoch(**kwargs)
                self._schedules.after_epoch()
                self.report(phase.name, (epoch + 1) * steps, phase.epochs * steps)
            self._stop_training = False  # a plugin that stopped the last epoch meant this phase
            if self._cache is not None:
                self._cache.changed(phase.start or 0)
        self._phase = None
        self.dataloader = self._images
        self.optimizer.zero_grad()

    def _after_training_exp(self, **kwargs: Any) -> None:
        self._samples = Counter()
        self.consolidate(self.task)
        self.model.assign_new_slots(self.task)
        new = [slot for slot, task in enumerate(self.model.task_of_slot) if task == self.task]
        self.model.origins |= {slot: self.origin(slot) for slot in new}
        self._take_keys()
        if self.classes_return == "merged":
            before = self.model.samples
            self.model.samples = before | {c: before.get(c, 0) + n for c, n in self._samples.items()}
        self.model.predictor = self._given or self.predictor(self.task, training=False)
        self._snapshot = None  # finished: what fails from here on undoes nothing
        with self._as_trained():
            super()._after_training_exp(**kwargs)

    def report(self, phase: str, done: int, total: int) -> None:
        """Tell the progress listener, if any."""
        if self.progress is not None:
            self.progress(phase, done, total)

    # --- Avalanche's loop: one batch ----------------------------------------------------------------------------------

    def _unpack_minibatch(self) -> None:
        self.mbatch = on_device(self.mbatch, self.device)

    def forward(self) -> Tensor:
        """Logits [B, L] indexed by class label; see :class:`ByLabel`."""
        width = 0 if self.mb_y is None else int(self.mb_y.max()) + 1
        if not self.model.classes and width:
            return torch.zeros(len(self.mb_y), *([width] if width <= WIDEST else []), device=self.device)
        run = self._run = Pass(training=self.is_training, width=width)
        if self.is_training:
            self.before_pass()
            run.start = getattr(self.dataloader, "start", None)
            run.routes = self.model.trained_routes = self.routes()
            run.dropout = self._dropout_generator
        output: Tensor = self.model(self.mb_x, run)
        if self.is_training or not self.task_incremental:
            return output
        run.logits = self._task_classes.restricted(run.logits, self.mbatch, self.model)
        output = self.model.by_label(run.logits, width, exact=False)
        return output

    def criterion(self) -> Tensor:
        """The phase's loss in training; in evaluation cross-entropy over the samples of known classes, NaN over none.

        Of ``mb_output``, which plugins may have changed.
        """
        run, output = self._run, self.mb_output
        columns_of = self._known_columns if self.is_training else self.model.columns_of
        columns_B = columns_of(self.mb_y).to(self.device)
        seen = columns_B >= 0
        if run is None or not (self.is_training or seen.any()):
            return torch.tensor(torch.nan, device=self.device)
        logits_BC = run.logits if output.dim() == 1 else output[:, self.model.classes]
        if self.is_training:
            assert self._phase is not None
            return self._phase.loss(Batch(run.features, logits_BC, columns_B, self._criterion))
        loss: Tensor = self._criterion(logits_BC[seen], columns_B[seen])
        return loss

    def backward(self) -> None:
        """Backward, unless the loss is no number.

        Raises:
            TrainingDiverged: says where.
        """
        if not math.isfinite(self.loss.item()):
            raise TrainingDiverged(
                f"the loss became {self.loss.item()} in task {self.task} at epoch {self.clock.train_exp_epochs}, "
                f"iteration {self.clock.train_epoch_iterations}: lower lr (now "
                f"{self.optimizer.param_groups[0]['lr']:g}) or check the inputs for values that are not finite"
            )
        super().backward()

    def optimizer_step(self) -> None:
        """The optimizer's step between the strategy's own hooks."""
        if self._schedules:
            assert self._dial is not None and self._phase is not None
            self._dial.turn(self.optimizer, [group.lr for group in self._phase.groups])
        elif self._pace is not None:
            self._pace.before_step(self.optimizer)
        self.before_step()
        longest: float | None = getattr(self.config, "clip_norm", None)
        if longest is not None:
            nn.utils.clip_grad_norm_([p for group in self.optimizer.param_groups for p in group["params"]], longest)
        super().optimizer_step()
        self.after_step()

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

    @contextmanager
    def _as_trained(self) -> Iterator[None]:
        """What was trained needs gradients again: plugins ask after a task how much each parameter matters."""
        rested = [parameter for parameter in self._trained.values() if not parameter.requires_grad]
        for parameter in rested:
            parameter.requires_grad_(True)
        try:
            yield
        finally:
            self.optimizer.zero_grad()
            for parameter in rested:
                parameter.requires_grad_(False)
            self._trained = {}

    def _take_plugins(self) -> None:
        """Check plugins that were added since the last call as the constructor does, and give them a place as it does.

        Raises:
            ConfigError: one cannot work here, by name; none of them is taken.
        """
        added = [plugin for plugin in self.plugins if not any(plugin is each for each in self._checked)]
        if not added:
            return
        name, later = type(self).__name__, self.trains and not self.trains_once
        if any(isinstance(plugin, LRSchedulerPlugin) for plugin in added):
            raise ConfigError(f"LRSchedulerPlugin was added to a {name} that is there already: pass it in plugins=")
        if self.trains:
            (periodic,) = (plugin for plugin in self.plugins if isinstance(plugin, PeriodicEval))
            measured = bool(self.evaluator.metrics)
            check_early_stopping(added, periodic.eval_every, periodic.peval_mode, measured=measured)
        check_plugins(added, name, self.device, trains=self.trains, later=later, expands=self.expands)
        if getattr(self.config, "cached_views", 0):
            check_image_plugins(added, name)
        # Avalanche's own come last: behind its clock a plugin would take an experience for the next one
        self.plugins.sort(key=lambda plugin: plugin is self.evaluator or isinstance(plugin, PeriodicEval | Clock))
        self._checked = list(self.plugins)

    def _check_between_tasks(self) -> None:
        if self._snapshot is not None and self.experience is not None:
            raise ClAdaptersError(f"task {self.task} is in training: a plugin may do this in after_training_exp")

    def _go_back(self) -> None:
        """Be as before the experience that is in training, if any."""
        if self._snapshot is not None:
            self._snapshot.restore()

    def _forget_pass(self) -> None:
        """Drop what belongs to the passes over one experience."""
        self._phase = self._pace = self._run = self._dropout_generator = self._cache = None
        self.mbatch = None

    def _check_complete(self) -> None:
        """A pool has adapters, heads and keys, but not what training goes on from."""
        keys = dict(self.model.parts.items()).get(CLASS_KEYS)
        if self.model.record_of_slot or not isinstance(keys, Keys | None):
            raise ClAdaptersError(
                "this model was made from a pool, which keeps no class statistics and nothing else that training goes "
                "on from: take model.save(folder) or a run's checkpoint; or train other classes apart, and put their "
                "adapters into the pool with AdapterPool.copy_to"
            )

    def _take_keys(self) -> None:
        """Keys of the newest task's classes, where the model keeps some."""
        if CLASS_KEYS not in self.model.parts:
            return
        keys = self.model.part(CLASS_KEYS, Keys)
        with self.timings.part("statistics"):
            draw = self.generator("keys", self.task)
            features = self.per_class(*self.training_features(None))
            for column, f_ND in zip(self.columns, features, strict=True):
                keys.add_class(f_ND, draw, column)

    def _check_returning(self, labels: Sequence[int]) -> None:
        """Look whether classes of an experience were learned before.

        Raises:
            DataError: some were, and this strategy, or this model, cannot take them.
        """
        model, name = self.model, type(self).__name__
        known = {column: label for column, label in enumerate(model.classes) if label in labels}
        if known and self.classes_return == "refused":
            raise DataError(
                f"classes {sorted(known.values())} were learned in an earlier task, and {name} takes each class in one "
                "task: merge the tasks, leave those images out, or take another strategy"
            )
        if self.classes_return == "merged" and not known.keys() <= model.samples.keys():
            raise DataError(
                f"classes {sorted(known.values())} were learned in an earlier task, and {name} merges their means by "
                "the number of samples, which this model does not have: it was saved by an older release. Train it "
                "anew, or leave those images out"
            )

    def _check_whole(self) -> None:
        """Look at an experience that is a small part of another.

        Raises:
            DataError: this strategy makes an adapter of each.
        """
        if not isinstance(self.experience, OnlineCLExperience):
            return
        name, size = type(self).__name__, len(self.experience.dataset)
        if self.retrieves:
            raise DataError(
                f"{name} makes an adapter for each experience, and this one (OnlineCLExperience) is {size} samples of "
                "another: train on the stream that was split, or take a strategy with fewer, such as SimpleCIL or LAE"
            )
        if self.first_task_adapts and self.trains and not self.model.classes:
            warnings.warn(
                f"{name} trains its first adapter on the first experience alone, here (OnlineCLExperience) {size} "
                "samples: train on a whole experience first, such as strategy.train(benchmark.train_stream[0])",
                stacklevel=2,
            )

    def _known_columns(self, labels_B: Tensor) -> Tensor:
        """Columns of the labels of training samples, int64 [B].

        Raises:
            DataError: a class that the experiences did not name.
        """
        columns_B: Tensor = self.model.columns_of(labels_B)
        if bool((columns_B < 0).any()):
            label = labels_B[columns_B.to(labels_B.device) < 0][0].item()
            raise DataError(
                f"a training sample came with label {label!r}, but the classes so far are {self.model.classes}: the "
                "labels that a data set gives and its targets must agree"
            )
        return columns_B

    def _training_config(self) -> TrainingConfig:
        assert isinstance(self.config, TrainingConfig)
        return self.config

    def _loader_of(self, phase: Phase) -> Any:
        """The task's images, or what is cached of them at the first block that this phase trains."""
        cache = self.activation_cache() if phase.start else None
        if cache is None or phase.start is None:
            return self._images
        return CachedLoader(
            cache,
            phase.start,
            self.routes(),
            batch=self.train_mb_size,
            draw=self.next_order,
            drop_last=self._loader_options.get("drop_last", getattr(self.config, "drop_last", False)),
        )

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
