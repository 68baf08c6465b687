"""APER (formerly ADAM): generalizability and adaptivity are all you need (Zhou et al., IJCV 2024).

task 0:      one adapter and a linear head, cross-entropy; then the adapter is frozen and the head thrown away
every task:  class means of [f(x); f*(x)], the features without and with the adapter
predict:     cosine to the class means (cl_adapters.predictors.concatenated)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import ClassVar

import torch

from cl_adapters.bank.bank import Route
from cl_adapters.model.heads import LinearHead
from cl_adapters.parts.class_means import ClassMeans
from cl_adapters.predictors.base import Predictor
from cl_adapters.predictors.concatenated import Concatenated
from cl_adapters.predictors.fixed import Fixed
from cl_adapters.strategies.base import AdapterStrategy, Returning, strategies
from cl_adapters.strategies.config import StrategyConfig, TrainingConfig
from cl_adapters.strategies.phases import Phase, all_classes_loss


@dataclasses.dataclass(frozen=True, kw_only=True)
class APERConfig(TrainingConfig):
    """Settings of APER; the defaults are those of the released code on CIFAR-100 (SGD, 20 epochs, cosine to 0).

    Adapter and head are trained at one learning rate (LAMDA-PILOT, exps/aper_aperpter.json). The released code trains
    through a cosine head with a learned scale; here it is a linear head, which is thrown away all the same.
    """

    lr: float = 0.01
    head_lr_factor: float = 1.0


@strategies.register("aper")
class APER(AdapterStrategy):
    """One adapter, trained on the first task only; class means on the bare and the adapted features together."""

    Config: ClassVar[type[StrategyConfig]] = APERConfig
    summary: ClassVar[str] = "first-task adapter, then class means on bare and adapted features (IJCV 2024)"
    classes_return: ClassVar[Returning] = "merged"
    first_task_adapts: ClassVar[bool] = True
    trains_once: ClassVar[bool] = True
    config: APERConfig

    def grow(self, task: int) -> None:
        """At the first task the adapter and its head."""
        if task == 0:
            self.grow_head()
            self.model.bank.add_slot(self.fresh_adapter())
            self.model.parts["class_means"] = ClassMeans(2 * self.model.backbone.num_features).to(self.device)

    def phases(self, task: int) -> Iterable[Phase]:
        """SGD on adapter and head in the first task, nothing afterwards."""
        if task == 0:
            yield self.adapter_phase(self.model.bank.slot_parameters(0), all_classes_loss)

    def routes(self) -> Route:
        """The one adapter."""
        return Route.single(0)

    def consolidate(self, task: int) -> None:
        """Freeze the adapter; keep the mean of every class."""
        if task == 0:
            self.model.bank.freeze(0)
            self.model.head = LinearHead(self.model.backbone.num_features).to(self.device)  # it served the adapter only
        with self.timings.part("statistics"):
            bare_ND, columns_N = self.training_features(None)
            adapted_ND, _ = self.training_features(self.routes())
            both_NW = torch.cat([bare_ND, adapted_ND], dim=1)
            self.keep_means(self.model.part("class_means", ClassMeans).head, both_NW, columns_N)

    def predictor(self, task: int, training: bool) -> Predictor:
        """Class means of both features; while the adapter trains, its linear head."""
        return Fixed(slot=0) if training and task == 0 else Concatenated(slots=(-1, 0))
