"""Method: what a strategy answers, and what helps it to.

A strategy answers four questions: what grows for an experience, what is trained in which phase, what is consolidated
afterwards, and how one predicts. Who writes one reads this file.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from cl_adapters._seeding import generator
from cl_adapters.backbones.frozen import FrozenBackbone
from cl_adapters.bank.bank import AdapterBank, Routes
from cl_adapters.config import build, to_plain
from cl_adapters.errors import ConfigError
from cl_adapters.model.facade import AdapterModel
from cl_adapters.model.heads import Init, PrototypeHead
from cl_adapters.model.state import Origin
from cl_adapters.predictors.base import Predictor
from cl_adapters.strategies.config import StrategyConfig, TrainingConfig
from cl_adapters.strategies.phases import Loss, ParamGroup, Phase, Schedule

Returning = Literal["refused", "taken", "merged"]
"""Classes that were learned before are refused; or taken, where ``returning`` says all that is needed of them; or their
means are merged by the number of samples so far (``keep_means``)."""


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


class Method:
    """The four questions, and helpers for those who answer them.

    ``phases`` is consumed lazily: each phase is asked for only when the one before has ended, so that a generator may
    look at what was trained, freeze it, and decide what comes next.

    Attributes:
        config: the resolved settings.
        model: the :class:`AdapterModel`.
        seed: of everything random.
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

    config: Any
    model: Any
    seed: int
    expansions: list[Expansion]

    # --- the four questions -------------------------------------------------------------------------------------------

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

    # --- helpers ------------------------------------------------------------------------------------------------------

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

    def _training_config(self) -> TrainingConfig:
        assert isinstance(self.config, TrainingConfig)
        return self.config
