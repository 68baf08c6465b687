"""Trainer: a method's answers carried out inside Avalanche's loops of training and evaluation."""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any

import torch
from avalanche.benchmarks.scenarios.online import OnlineCLExperience
from avalanche.core import BasePlugin
from avalanche.training.plugins import LRSchedulerPlugin
from avalanche.training.plugins.clock import Clock
from avalanche.training.templates import SupervisedTemplate
from avalanche.training.templates.base_sgd import PeriodicEval
from torch import Tensor, nn
from torch.utils.data import DataLoader

from cl_adapters._precision import uncached_autocast
from cl_adapters._seeding import derive, generator, isolated, seed_globals
from cl_adapters._timing import Stopwatch
from cl_adapters.backbones.inputs import to_device
from cl_adapters.bank.bank import Routes
from cl_adapters.errors import ClAdaptersError, ConfigError, DataError, TrainingDiverged
from cl_adapters.parts.keys import CLASS_KEYS, Keys
from cl_adapters.predictors.base import Predictor
from cl_adapters.strategies._loop.activation_cache import ActivationCache, CachedLoader
from cl_adapters.strategies._loop.batches import check_first, on_device, sample_batch
from cl_adapters.strategies._loop.by_label import WIDEST, Pass
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
from cl_adapters.strategies._loop.snapshot import Snapshot
from cl_adapters.strategies._loop.task_labels import TaskClasses
from cl_adapters.strategies.config import TrainingConfig
from cl_adapters.strategies.method import Method
from cl_adapters.strategies.phases import Batch, Phase
from cl_adapters.strategies.recipe import (
    Dial,
    Pace,
    Schedules,
)


class Trainer(Method, SupervisedTemplate):
    """An Avalanche template that grows, trains phase by phase, consolidates, and evaluates by the predictor.

    Attributes:
        timings: seconds of "train", "statistics", "alignment" and "eval".
        trainable_parameters: at once, the most in the newest task.
    """

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
    timings: Stopwatch
    progress: Callable[[str, int, int], None] | None
    trainable_parameters: int
    task_incremental: bool
    _task_classes: TaskClasses
    _loader_options: dict[str, Any]
    _given: Predictor | None
    _dial: Dial | None
    _schedules: Schedules
    _checked: Sequence[BasePlugin] = ()
    _samples: Counter[int]

    # --- a task -------------------------------------------------------------------------------------------------------

    def recall(self, experiences: Iterable[Any]) -> None:
        """On resume: given the experiences of finished tasks, for their task labels and, where kept, their data."""
        for experience in experiences:
            self._task_classes.note(experience)

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
            self.model.note_places()
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

    # --- one batch ----------------------------------------------------------------------------------------------------

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

    # --- passes over the task's data ----------------------------------------------------------------------------------

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

    # --- private ------------------------------------------------------------------------------------------------------

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
