"""MOS: model surgery for pre-trained class-incremental learning (Sun et al., AAAI 2025).

task t:  adapter A_t starts from A_(t-1);  loss = CE(current classes) + reg * L_orth
         after every step  A_t <- (1 - m) A_t + m mu_t,   mu_t = mean(A_0 .. A_(t-1))
then:    class Gaussians under A_t;  alignment of the linear head;  prototypes under A_0
predict: self-refined retrieval (cl_adapters.predictors.self_refine)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from cl_adapters.bank.bank import Route
from cl_adapters.config import check_range
from cl_adapters.merge.ema import ema
from cl_adapters.merge.mean import mean
from cl_adapters.model.alignment import Alignment, align
from cl_adapters.model.state import Origin
from cl_adapters.model.statistics import ClassStatistics, Covariance
from cl_adapters.predictors.base import Predictor
from cl_adapters.predictors.fixed import Fixed
from cl_adapters.predictors.self_refine import SelfRefine
from cl_adapters.strategies.base import AdapterStrategy, Returning, strategies
from cl_adapters.strategies.config import StrategyConfig, TrainingConfig
from cl_adapters.strategies.phases import Batch, Phase, current_task_loss


@dataclasses.dataclass(frozen=True, kw_only=True)
class MOSConfig(TrainingConfig):
    """Settings of MOS; the defaults are those of the released CIFAR-100 configuration.

    Attributes:
        merge: "paper" merges once after every optimizer step; "released" follows the training schedule of the
            released code, in which every forward pass merges all L layers L times (layer l of that pass computes
            with (1 - m)^(l + 1) of the deviation) before the step and its own merge. Evaluation is pure in both.
        adapter_momentum: m, share of mu_t in one merge.
        reg: weight of the orthogonality loss.
        temperature: divisor of its similarities.
        covariance: of the class Gaussians: "full", "diagonal" (ImageNet-A) or "low_rank".
        alignment: settings of the classifier alignment, which runs from the second task on.
        ensemble: add the prototype logits when predicting.
        max_steps: of the retrieval.
    """

    merge: Literal["paper", "released"] = "paper"
    adapter_momentum: float = 0.1
    reg: float = 0.1
    temperature: float = 0.8
    covariance: Covariance = "full"
    alignment: Alignment = dataclasses.field(default_factory=Alignment)
    ensemble: bool = True
    max_steps: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, "[0, 1]", "adapter_momentum")
        check_range(self, "[0, inf)", "reg")
        check_range(self, "(0, inf)", "temperature")
        check_range(self, "[1, inf)", "max_steps")


@strategies.register("mos")
class MOS(AdapterStrategy):
    """One adapter per task, merged with its predecessors while it trains; retrieval by its own predictions."""

    Config: ClassVar[type[StrategyConfig]] = MOSConfig
    summary: ClassVar[str] = "adapter merging and self-refined retrieval (AAAI 2025)"
    classes_return: ClassVar[Returning] = "merged"
    retrieves: ClassVar[bool] = True
    config: MOSConfig

    # --- grow ----------------------------------------------------------------------------------------------------

    def grow(self, task: int) -> None:
        """New head rows, and an adapter that continues from the newest one."""
        model = self.model
        self.grow_head()
        start = model.bank.export(task - 1) if task else self.fresh_adapter()
        model.bank.add_slot(start)

    # --- train ---------------------------------------------------------------------------------------------------

    def phases(self, task: int) -> Iterable[Phase]:
        """One phase: the newest adapter and the head."""
        config, model = self.config, self.model
        self._live = model.bank.slot_parameters(task)
        blocks = model.bank.blocks
        keys = [key for key, _ in model.bank.named_slot(task)]
        block_of = {site.name: blocks.index(site.block) for site in model.bank.sites}
        self._layer = [block_of[key.rpartition("/")[0]] for key in keys]
        self._anchor = self._mean_of_finished(task)
        known, returning = self.known, self.returning
        means_KD = None if model.statistics is None else model.statistics.means_CD.to(self.device)
        if means_KD is not None and returning:  # a class need not be apart from its own mean
            means_KD = means_KD[[column for column in range(known) if column not in returning]]

        def loss(batch: Batch) -> Tensor:
            plain = current_task_loss(batch, known, returning)
            return plain + config.reg * orthogonality_loss(batch.features, means_KD, config.temperature)

        yield self.adapter_phase(self._live, loss)

    def routes(self) -> Route:
        """Everything through the newest adapter."""
        return Route.single(self.task)

    def before_pass(self) -> None:
        """Released schedule: layer l computes with l + 1 merges applied."""
        if self.config.merge == "released" and self._anchor:
            self._start = [parameter.detach().clone() for parameter in self._live]
            self._merge(self._start, [layer + 1 for layer in self._layer])

    def before_step(self) -> None:
        """Released schedule: the step is taken from weights merged once per layer."""
        if self.config.merge == "released" and self._anchor:
            self._merge(self._start, [len(self.model.bank.blocks)] * len(self._live))

    def after_step(self) -> None:
        """Merge once, in both schedules."""
        if self._anchor:
            self._merge(self._live, [1] * len(self._live))

    @torch.no_grad()
    def _merge(self, weights: Iterable[Tensor], steps: Iterable[int]) -> None:
        """Set the live adapter to ``weights`` merged ``steps`` times with mu_t."""
        for live, weight, anchor, n in zip(self._live, weights, self._anchor, steps, strict=True):
            live.copy_(ema([weight.detach(), anchor], self.config.adapter_momentum, n))

    def _mean_of_finished(self, task: int) -> list[Tensor]:
        """mu_t, tensor by tensor; empty at the first task."""
        finished = [[p.detach() for p in self.model.bank.slot_parameters(slot)] for slot in range(task)]
        return [mean(list(column)) for column in zip(*finished, strict=True)]

    # --- consolidate ---------------------------------------------------------------------------------------------

    def consolidate(self, task: int) -> None:
        """Freeze the adapter; Gaussians under it; align the head; prototypes under adapter 0."""
        model, config = self.model, self.config
        model.bank.freeze(task)
        self._live, self._anchor, self._start, self._layer = [], [], [], []
        with self.timings.part("statistics"):
            if model.statistics is None:
                model.statistics = ClassStatistics.of_kind(config.covariance, model.backbone.num_features)
            f_ND, columns_N = self.training_features(Route.single(task))
            for column, f_MD in zip(self.columns, self.per_class(f_ND, columns_N), strict=True):
                if column < self.known:
                    model.statistics.merge(column, f_MD, model.samples[column])
                else:
                    model.statistics.add(f_MD)
            if task:  # under adapter 0 they are the same features for the first task
                f_ND, columns_N = self.training_features(Route.single(0))
            self.keep_means(model.prototypes, f_ND, columns_N)
        if task and config.alignment.epochs:
            with self.timings.part("alignment"):
                n = config.alignment.samples_per_class or 5 * config.train_mb_size
                align(
                    model.head,
                    model.statistics,
                    dataclasses.replace(config.alignment, samples_per_class=n),
                    weight_decay=config.weight_decay,
                    generator=self.generator("alignment", task),
                )

    def origin(self, slot: int) -> Origin:
        """All adapters before: it started from the newest, and was merged with their mean after every step."""
        if not slot:
            return Origin()
        merge = {"method": "ema", "momentum": self.config.adapter_momentum, "schedule": self.config.merge}
        aligned = {"head": "aligned"} if self.config.alignment.epochs else {}
        return Origin(parents=tuple(range(slot)), merge=merge | aligned)

    # --- predict -------------------------------------------------------------------------------------------------

    def predictor(self, task: int, training: bool) -> Predictor:
        """Self-refined retrieval; while a task trains, its own adapter."""
        if training:
            return Fixed(slot=task)
        return SelfRefine(max_steps=self.config.max_steps, ensemble=self.config.ensemble)


def orthogonality_loss(f_BD: Tensor, means_KD: Tensor | None, temperature: float = 0.8) -> Tensor:
    """L_orth of MOS: every row of [class means; batch features] should be most similar to itself.

    S = M M^T / temperature on raw (not normalised) rows; mean over the rows of the cross-entropy with the row's own
    index (released mos.py:335-355). Means, of all classes of finished tasks, are constants; None at the first task.
    """
    rows_MD = f_BD if means_KD is None else torch.cat([means_KD.to(f_BD), f_BD])
    similarity_MM = rows_MD @ rows_MD.T / temperature
    return F.cross_entropy(similarity_MM, torch.arange(len(rows_MD), device=f_BD.device))
