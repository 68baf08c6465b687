"""Joint: one adapter trained on the data of all tasks so far. The upper bound: it keeps every image."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any, ClassVar, Literal

import torch
from avalanche.benchmarks.utils import AvalancheDataset
from avalanche.benchmarks.utils.utils import concat_datasets

from cl_adapters.config import OMITTED_AT_DEFAULT
from cl_adapters.errors import ClAdaptersError
from cl_adapters.model.heads import LinearHead
from cl_adapters.strategies.base import strategies
from cl_adapters.strategies.config import StrategyConfig, TrainingConfig
from cl_adapters.strategies.phases import Phase
from cl_adapters.strategies.sequential import Sequential


@dataclasses.dataclass(frozen=True, kw_only=True)
class JointConfig(TrainingConfig):
    """Settings of the upper bound.

    Attributes:
        budget: "full" runs ``train_epochs`` epochs over everything seen so far at every task; "equal" runs as many
            steps as Sequential takes on the newest task alone (rounded up to whole epochs).
        restart: train a new adapter and head at every task, so that the last model is what the recipe gives on all
            tasks at once, however they were split: the bound to compare others with, at the same epochs. Otherwise
            training goes on from the model of the task before.
    """

    budget: Literal["full", "equal"] = "full"
    restart: bool = dataclasses.field(default=False, metadata=OMITTED_AT_DEFAULT)


@strategies.register("joint")
class Joint(Sequential):
    """Sequential on the union of all experiences so far, from the model of the task before or anew."""

    Config: ClassVar[type[StrategyConfig]] = JointConfig
    summary: ClassVar[str] = "one adapter on the data of all tasks so far: the upper bound"
    config: JointConfig

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._datasets: list[AvalancheDataset] = []

    def train_dataset_adaptation(self, **kwargs: Any) -> None:
        """Train on everything seen so far.

        Raises:
            ClAdaptersError: the data of some tasks that the model has learned are not here.
        """
        learned = self.model.num_tasks
        if len(self._datasets) != learned:
            raise ClAdaptersError(
                f"Joint trains on the data of all tasks, and has those of {len(self._datasets)} of the {learned} that "
                f"its model has learned: give them with strategy.recall(benchmark.train_stream[:{learned}]) first"
            )
        super().train_dataset_adaptation(**kwargs)
        self._datasets.append(self.experience.dataset)
        self.adapted_dataset = concat_datasets([dataset.train() for dataset in self._datasets])

    @torch.no_grad()
    def grow(self, task: int) -> None:
        """Rows and adapter of Sequential, or new values in all of them."""
        if task and self.config.restart:
            self.model.head = LinearHead(self.model.backbone.num_features).to(self.device)
            fresh = self.fresh_adapter()
            for key, parameter in self.model.bank.named_slot(0):
                parameter.copy_(fresh[key])
        super().grow(task)

    def phases(self, task: int) -> Iterable[Phase]:
        """The phase of Sequential, shorter where the budget is equal."""
        for phase in super().phases(task):
            share = 1.0 if self.config.budget == "full" else len(self._datasets[-1]) / len(self.adapted_dataset)
            yield dataclasses.replace(phase, epochs=max(1, round(phase.epochs * share + 0.499)))

    def recall(self, experiences: Iterable[Any]) -> None:
        """Take back the data of finished tasks."""
        finished = list(experiences)
        super().recall(finished)
        self._datasets = [experience.dataset for experience in finished]
