"""O-LoRA: a new LoRA per task in a direction of its own; all of them are summed, before and after."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from cl_adapters.bank.routes import Routes, summed
from cl_adapters.config import check_range
from cl_adapters.errors import ConfigError
from cl_adapters.language.model import LanguageModel
from cl_adapters.predictors.summed import Summed
from cl_adapters.strategies.instruct.base import InstructConfig, InstructMethod, check_learned, instruct_methods


@dataclass(frozen=True, kw_only=True)
class OLoRAConfig(InstructConfig):
    """Settings of :class:`OLoRA`.

    Attributes:
        orthogonality: lambda_1 of the released code, the weight of the penalty.
        l2: lambda_2, the weight of the new adapter's length.
    """

    orthogonality: float = 0.5
    l2: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, "[0, inf)", "orthogonality", "l2")


@instruct_methods.register("o_lora")
class OLoRA(InstructMethod):
    """Orthogonal subspace learning (Wang et al. 2023, arXiv 2310.14152).

    In task t the LoRA of t is trained, those of earlier tasks are frozen, and the model computes with the sum of all.
    With A_i, r x D, the down-projection of task i at a site, the loss gets

        lambda_1 sum_sites sum_{i < t} sum |A_t A_i^T|  +  lambda_2 sum_tensors ||.||_2

    as in the released code (equation 8 of the paper has the squares of A_i^T A_t instead of the absolute values).
    """

    Config: ClassVar[type[InstructConfig]] = OLoRAConfig
    summary: ClassVar[str] = "a LoRA per task, orthogonal to the earlier ones, all summed (Wang et al. 2023)"

    def __init__(self, language: LanguageModel, config: InstructConfig, seed: int = 0) -> None:
        super().__init__(language, config, seed)
        self._down: list[tuple[str, Tensor]] = []
        adapter, site = language.bank.adapter, language.bank.sites[0]
        if adapter.delta_factors({name: torch.zeros(shape) for name, shape in adapter.shapes(site).items()}) is None:
            raise ConfigError(f"o_lora needs adapters with a down-projection, lora, not {type(adapter).__name__}")

    def grow(self, name: str, task: int) -> int:
        """A fresh adapter; the down-projections of the earlier ones are kept at hand, one below the other."""
        self.language.model.predictor = Summed()  # so that a saved model sums too, and is not taken for a pool
        earlier = [self._down_projections(slot) for slot in range(self.language.model.num_slots)]
        sites = earlier[0] if earlier else {}
        self._down = [(site, torch.cat([of_slot[site].detach() for of_slot in earlier])) for site in sites]
        return self.language.add_task(name, self.generator("adapter", task))

    def training_routes(self, rows: int) -> Routes:
        """All adapters, summed."""
        return summed(range(self.language.model.num_slots), rows, self.language.device)

    def penalty(self) -> Tensor | None:
        """The overlap with earlier directions, and the length of the new adapter."""
        config: Any = self.config
        newest = self.language.model.num_slots - 1
        parts: list[Tensor] = []
        if self._down and config.orthogonality:
            own = self._down_projections(newest)
            parts += [config.orthogonality * (own[site] @ a_RD.T).abs().sum() for site, a_RD in self._down]
        if config.l2:
            parts += [config.l2 * value.norm() for value in self.language.bank.slot_parameters(newest)]
        return torch.stack(parts).sum() if parts else None

    def routes(self, prompts: Sequence[str]) -> Routes:
        """All adapters, summed, whatever the prompt."""
        check_learned(self.language)
        return summed(range(self.language.model.num_slots), len(prompts), self.language.device)

    def _down_projections(self, slot: int) -> dict[str, Tensor]:
        """A [r, D] of one adapter by site."""
        by_site: dict[str, dict[str, Tensor]] = {}
        for key, value in self.language.bank.named_slot(slot):
            site, _, name = key.rpartition("/")
            by_site.setdefault(site, {})[name] = value
        found = {}
        for site, params in by_site.items():
            factors = self.language.bank.adapter.delta_factors(params)
            assert factors is not None
            found[site] = factors[0]
        return found
