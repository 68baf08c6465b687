"""LifeCycle: how a strategy's answers are carried out inside Avalanche's training and evaluation loops."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from avalanche.training.templates import SupervisedTemplate
from torch import Tensor, nn

from cl_adapters._seeding import derive, generator, isolated, seed_globals
from cl_adapters.errors import ClAdaptersError, TrainingDiverged
from cl_adapters.parts.keys import CLASS_KEYS, Keys
from cl_adapters.predictors.base import Predictor
from cl_adapters.strategies._loop.activation_cache import ViewLoader, Views
from cl_adapters.strategies._loop.experiences import check_experience, experience_classes
from cl_adapters.strategies._loop.order import lengths_of, training_loader
from cl_adapters.strategies.expansion import Expansion
from cl_adapters.strategies.phases import Batch, Phase


class LifeCycle(SupervisedTemplate):
    """What Avalanche calls, and when, in terms of the hooks of :class:`cl_adapters.strategies.base.AdapterStrategy`."""

    expansions: list[Expansion]
    _stop_training: bool
    _unfinished: bool
    _phase: Phase | None
    _features: Tensor | None
    _noise: torch.Generator | None
    _views: Views | None
    inference: Predictor | None
    explicit_order: ClassVar[bool] = False
    """Whether images are shuffled by the strategy's own generators, as cached views always are."""

    # --- a task --------------------------------------------------------------------------------------------------

    def train(self, experiences: Any, eval_streams: Any = None, **loader_options: Any) -> Any:
        """Learn one experience, or several in order; see Avalanche. Global random states are left as they were.

        Raises:
            ClAdaptersError: an error or interrupt stopped an earlier call in the middle of a task; or the model was
                made from a pool of adapters.
        """
        self._check_finished()
        self._check_complete()
        self._loader_options = loader_options
        self.expansions = []
        try:
            with isolated(self.device), self.timings.part("train"):
                return super().train(experiences, eval_streams, **loader_options)
        finally:
            self._phase = self._features = self._noise = self._views = None
            self._loader_options = {}

    def eval(self, experiences: Any, **loader_options: Any) -> Any:
        """Evaluate; see Avalanche. Changes no tensor of the model and no random state."""
        with isolated(self.device), self.timings.part("eval"):
            return super().eval(experiences, **loader_options)

    def train_dataset_adaptation(self, **kwargs: Any) -> None:
        """Check the experience before anything grows, then let Avalanche choose the data."""
        self.model.backbone.check_frozen()
        self.model.check_new(check_experience(self.experience))
        task = self.model.num_tasks
        seed_globals(derive(self.seed, "loader", task))
        super().train_dataset_adaptation(**kwargs)

    def make_train_dataloader(self, **kwargs: Any) -> None:
        """Avalanche's loader, or one in the strategy's own order: always for texts, which it batches by length."""
        self._visits = 0
        data = self.adapted_dataset
        if not self.explicit_order and (lengths_of(data) is None or not kwargs.get("shuffle", True)):
            super().make_train_dataloader(**kwargs)
        else:
            self.dataloader = training_loader(
                data,
                self.train_mb_size,
                self.next_order,
                num_workers=kwargs.get("num_workers", 0),
                drop_last=kwargs.get("drop_last", False),
            )
        self._own_images = self.dataloader

    def model_adaptation(self, model: Any = None) -> Any:
        """Grow for the experience, in training only: Avalanche calls this in evaluation too."""
        if self.is_training:
            labels = experience_classes(self.experience)
            self.model.add_task(labels)
            self._unfinished = True
            self.grow(self.task)
            self.model.date_slots(self.task)
            self.model.predictor = self.predictor(self.task, training=True)
        return self.model

    def make_optimizer(self, **kwargs: Any) -> None:
        """Nothing: each phase installs its own parameters, in place."""
        self.optimized_param_id: dict[str, Any] = {}

    def _train_exp(self, experience: Any, eval_streams: Any = None, **kwargs: Any) -> None:
        self._noise = generator(self.seed, "dropout", self.task, device=self.device)
        self.trainable_parameters = 0
        self._images = self.dataloader  # a plugin may have put its own
        for phase in self.phases(self.task):
            self._phase = phase
            self.dataloader = self._loader_of(phase)
            phase.install(self.optimizer)
            self.trainable_parameters = max(self.trainable_parameters, phase.num_parameters)
            steps = len(self.dataloader)
            for epoch in range(phase.epochs):
                phase.set_epoch(self.optimizer, epoch)
                self.before_epoch(epoch)
                self._before_training_epoch(**kwargs)
                if self._stop_training:
                    self._stop_training = False
                    break
                self.training_epoch(**kwargs)
                self._after_training_epoch(**kwargs)
                self.report(phase.name, (epoch + 1) * steps, phase.epochs * steps)
            if self._views is not None:
                self._views.changed(phase.start or 0)
        self._phase = None
        self.dataloader = self._images
        self.optimizer.zero_grad()

    def _after_training_exp(self, **kwargs: Any) -> None:
        self.consolidate(self.task)
        self.model.date_slots(self.task)
        new = [slot for slot, task in enumerate(self.model.task_of_slot) if task == self.task]
        self.model.origins |= {slot: self.origin(slot) for slot in new}
        self._take_keys()
        self.model.predictor = self.inference or self.predictor(self.task, training=False)
        self._unfinished = False
        super()._after_training_exp(**kwargs)

    def report(self, phase: str, done: int, total: int) -> None:
        """Tell the progress listener, if any."""
        if self.progress is not None:
            self.progress(phase, done, total)

    # --- one batch -----------------------------------------------------------------------------------------------

    def forward(self) -> Tensor:
        """Logits [B, L] indexed by class label, as Avalanche's metrics expect; unseen labels at minus infinity."""
        if self.is_training:
            self.before_pass()
            start = getattr(self.dataloader, "start", None)
            self._features = self.model.features(self.mb_x, self.routes(), self._noise, start=start)
            columns_BC = self.model.head(self._features)
        elif not self.model.classes:
            return torch.zeros(len(self.mb_y), int(self.mb_y.max()) + 1, device=self.device)
        else:
            columns_BC = self.model(self.mb_x)
        return self._by_label(columns_BC)

    def criterion(self) -> Tensor:
        """The phase's loss in training; in evaluation cross-entropy over the samples of known classes."""
        columns_B = self.model.columns_of(self.mb_y).to(self.device)
        logits_BC: Tensor = self.mb_output[:, self.model.classes]
        if self.is_training:
            assert self._phase is not None
            assert self._features is not None
            return self._phase.loss(Batch(self._features, logits_BC, columns_B))
        seen = columns_B >= 0
        if not seen.any():
            return logits_BC.new_zeros(())
        return nn.functional.cross_entropy(logits_BC[seen], columns_B[seen])

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
        self.before_step()
        super().optimizer_step()
        self.after_step()

    # --- private -------------------------------------------------------------------------------------------------

    def _check_finished(self) -> None:
        if self._unfinished:
            raise ClAdaptersError(
                f"task {self.task} was left unfinished by an error, so this model is half trained: load the model that "
                "was saved after the task before and make the strategy from it, or begin anew"
            )

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
            for f_ND in self.per_class(*self.training_features(None)):
                keys.add_class(f_ND, draw)

    def _loader_of(self, phase: Phase) -> Any:
        """The task's images, or what is cached of them at the first block that this phase trains."""
        views = self.views() if phase.start else None
        if views is None or phase.start is None:
            return self._images
        return ViewLoader(
            views,
            phase.start,
            self.routes(),
            batch=self.train_mb_size,
            draw=self.next_order,
            drop_last=self._loader_options.get("drop_last", getattr(self.config, "drop_last", False)),
        )

    def _by_label(self, logits_BC: Tensor) -> Tensor:
        width = max(*self.model.classes, int(self.mb_y.max())) + 1
        labels = torch.tensor(self.model.classes, device=logits_BC.device)
        wide = logits_BC.new_full((len(logits_BC), width), -torch.inf)
        return wide.index_copy(1, labels, logits_BC)
