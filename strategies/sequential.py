"""Sequential: one adapter and one head, tuned on and on. The lower bound: it forgets."""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar

from cl_adapters.bank.bank import Route
from cl_adapters.predictors.base import Predictor
from cl_adapters.predictors.fixed import Fixed
from cl_adapters.strategies.base import AdapterStrategy, Returning, strategies
from cl_adapters.strategies.config import StrategyConfig, TrainingConfig
from cl_adapters.strategies.phases import Phase, all_classes_loss


@strategies.register("sequential")
class Sequential(AdapterStrategy):
    """One adapter for all tasks, plain cross-entropy over all classes so far, no protection of old ones."""

    Config: ClassVar[type[StrategyConfig]] = TrainingConfig
    summary: ClassVar[str] = "one adapter tuned on every task in turn: the lower bound"
    classes_return: ClassVar[Returning] = "taken"
    frozen_after_task: ClassVar[bool] = False
    config: TrainingConfig

    def grow(self, task: int) -> None:
        """New rows in the head; the adapter is made once."""
        self.grow_head()
        if task == 0:
            self.model.bank.add_slot(self.fresh_adapter())

    def phases(self, task: int) -> Iterable[Phase]:
        """SGD on the adapter and the whole head."""
        self.model.bank.requires_grad_(True)
        yield self.adapter_phase(self.model.bank.slot_parameters(0), all_classes_loss)

    def consolidate(self, task: int) -> None:
        """Nothing to do."""

    def routes(self) -> Route:
        """The one adapter."""
        return Route.single(0)

    def predictor(self, task: int, training: bool) -> Predictor:
        """The one adapter and the linear head."""
        return Fixed(slot=0)
