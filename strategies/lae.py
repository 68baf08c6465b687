"""LAE: a unified continual learning framework with general parameter-efficient tuning (Gao et al., ICCV 2023).

learning:      one online adapter, trained over all tasks; frozen in the first epochs of every task after the first
accumulation:  an offline adapter, copied from it at the start of the second task; after every optimizer step
               offline <- decay * offline + (1 - decay) * online
ensemble:      p = max(softmax(z_online), softmax(z_offline)) (cl_adapters.predictors.max_ensemble)

Source: the authors' repository at 1680e49; where a re-implementation differs, the authors' is followed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from functools import partial
from typing import Any, ClassVar

import torch

from cl_adapters.adapters.base import AdapterField
from cl_adapters.adapters.bottleneck import Bottleneck
from cl_adapters.backbones.frozen import FrozenBackbone
from cl_adapters.bank.bank import AdapterBank, Route, sites_of
from cl_adapters.config import OMITTED_AT_DEFAULT, check_range
from cl_adapters.merge.ema import ema
from cl_adapters.model.facade import AdapterModel
from cl_adapters.model.heads import normal
from cl_adapters.parts.accumulation import Accumulation
from cl_adapters.predictors.base import Predictor
from cl_adapters.predictors.fixed import Fixed
from cl_adapters.predictors.max_ensemble import MaxEnsemble
from cl_adapters.strategies.base import AdapterStrategy, Returning, strategies
from cl_adapters.strategies.config import OptimizerName, ScheduleName, StrategyConfig, TrainingConfig
from cl_adapters.strategies.phases import Phase, current_task_loss

ONLINE, OFFLINE = 0, 1


def _default_adapter() -> Bottleneck:
    """The "Adapter" of LAE: parallel to the attention, calibrated by a learned scale that starts at 1."""
    return Bottleneck(
        place="attn", mode="parallel", bottleneck=5, scale=1.0, learn_scale=True, activation="gelu", dropout=0.0
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class LAEConfig(TrainingConfig):
    """Settings of LAE; the defaults are those of the released CIFAR-100 configuration.

    Attributes:
        adapter: adapter type with its options; default the "Adapter" of LAE. Its "LoRA" is
            ``{"type": "lora", "learn_scale": True}``, its "Prefix" ``"prefix"``, its Adapter for ConvNeXt
            ``"conv_bottleneck"``.
        blocks: blocks that get adapters; None: the first ``first_blocks``.
        first_blocks: how many, or all where the backbone has fewer: 5 in a ViT, 10 in Swin-B, 15 in ConvNeXt-B.
        optimizer, schedule: Adam at a constant learning rate.
        weight_decay: other than 0 it also moves the head's rows of finished tasks.
        frozen_epochs: of every task after the first, the first epochs that train the head alone; None: three fifths of
            ``train_epochs``, rounded down, as in all released configurations (3 of 5, 30 of 50).
        decay: of the offline adapter. After k steps its start still has the weight decay ** k.
        drop_last: leave out the last batch of an epoch if it is incomplete (never the only one).
    """

    adapter: AdapterField = dataclasses.field(default_factory=_default_adapter)
    first_blocks: int = 5
    train_mb_size: int = 24
    train_epochs: int = 5
    lr: float = 0.0028125
    head_lr_factor: float = 1.0
    optimizer: OptimizerName = dataclasses.field(default="adam", metadata=OMITTED_AT_DEFAULT)
    weight_decay: float = 0.0
    schedule: ScheduleName = dataclasses.field(default="constant", metadata=OMITTED_AT_DEFAULT)
    frozen_epochs: int | None = None
    decay: float = 0.9999
    drop_last: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, "[1, inf)", "first_blocks")
        if self.frozen_epochs is not None and not 0 <= self.frozen_epochs <= self.train_epochs:
            raise ValueError(
                f"frozen_epochs must lie between 0 and train_epochs ({self.train_epochs}), got {self.frozen_epochs}; "
                "leave it out for three fifths of them"
            )
        check_range(self, "[0, 1]", "decay")

    def frozen_in(self, task: int) -> int:
        """Epochs of task ``task`` (0-based) in which the adapter is frozen."""
        if task == 0:
            return 0
        return 3 * self.train_epochs // 5 if self.frozen_epochs is None else self.frozen_epochs


@strategies.register("lae")
class LAE(AdapterStrategy):
    """An online adapter that learns, an offline one that accumulates it, and the more confident of both answers."""

    Config: ClassVar[type[StrategyConfig]] = LAEConfig
    summary: ClassVar[str] = "an online adapter, its moving average, and the ensemble of both (ICCV 2023)"
    classes_return: ClassVar[Returning] = "taken"
    frozen_after_task: ClassVar[bool] = False
    config: LAEConfig

    # --- grow ----------------------------------------------------------------------------------------------------

    def new_model(self, backbone: FrozenBackbone) -> AdapterModel:
        """Sites for adapters in the chosen blocks, or in the first ones that the backbone has."""
        config = self.config
        blocks = config.blocks
        if blocks is None:
            blocks = tuple(sorted({site.block for site in sites_of(backbone, config.adapter)}))[: config.first_blocks]
        return AdapterModel(backbone, AdapterBank(backbone, config.adapter, blocks))

    def grow(self, task: int) -> None:
        """New head rows; the online adapter at the first task, the offline one as its copy at the second."""
        model = self.model
        self.grow_head(normal(0.001))
        if task == 0:
            model.bank.add_slot(self.fresh_adapter())
        elif task == 1:
            model.bank.freeze(model.bank.add_slot(model.bank.export(ONLINE)))
            model.parts["accumulation"] = Accumulation().to(self.device)

    # --- train ---------------------------------------------------------------------------------------------------

    def make_train_dataloader(self, **kwargs: Any) -> None:
        """Leave out an incomplete last batch, unless ``train(..., drop_last=False)`` says otherwise."""
        whole_batches = self.config.drop_last and len(self.adapted_dataset) >= self.train_mb_size
        super().make_train_dataloader(**{"drop_last": whole_batches, **kwargs})

    def phases(self, task: int) -> Iterable[Phase]:
        """One phase, so that the head's moments go on when the adapter thaws (see :meth:`before_epoch`)."""
        loss = partial(current_task_loss, known=self.known, returning=self.returning)
        yield self.adapter_phase(self.model.bank.slot_parameters(ONLINE), loss)

    def before_epoch(self, epoch: int) -> None:
        """Freeze or thaw the online adapter; Adam leaves out what has no gradient and keeps no moments of it."""
        trains = epoch >= self.config.frozen_in(self.task)
        for parameter in self.model.bank.slot_parameters(ONLINE):
            parameter.requires_grad_(trains)

    def routes(self) -> Route:
        """The online adapter."""
        return Route.single(ONLINE)

    @torch.no_grad()
    def after_step(self) -> None:
        """Accumulate, frozen epochs included (released main.py:61-64)."""
        if self.task == 0:
            return
        bank = self.model.bank
        for offline, online in zip(bank.slot_parameters(OFFLINE), bank.slot_parameters(ONLINE), strict=True):
            offline.copy_(ema([offline, online], momentum=1 - self.config.decay))
        self.model.part("accumulation", Accumulation).count()

    def consolidate(self, task: int) -> None:
        """Nothing is consolidated; the online adapter rests until its next training."""
        self.model.bank.freeze(ONLINE)

    # --- predict -------------------------------------------------------------------------------------------------

    def predictor(self, task: int, training: bool) -> Predictor:
        """The online adapter in the first task, the ensemble from the second on."""
        return MaxEnsemble(slots=(ONLINE, OFFLINE)) if task else Fixed(slot=ONLINE)
