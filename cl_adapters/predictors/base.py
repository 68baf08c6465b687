"""What a predictor is: a pure function from a model and inputs to logits, with what it did to get them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from cl_adapters.config import build_named, to_plain
from cl_adapters.features import LazyFeatures
from cl_adapters.model.state import ModelState
from cl_adapters.registry import Registry


@dataclass(frozen=True)
class Prediction:
    """Answers for B samples.

    Attributes:
        logits: float32 [B, C]; columns are ``model.classes``.
        adapter: int64 [B], the slot whose features the answer comes from; -1 is the bare backbone.
        passes: float32 [B], backbone passes that were run for each sample; fractions where adapters sit in late blocks
            and the blocks before them were shared.
        abstained: bool [B], samples that are of no known class: their logits are cosines to the classes' means under
            the bare backbone. None where no threshold was set (:mod:`cl_adapters.openset`).
    """

    logits: Tensor
    adapter: Tensor
    passes: Tensor
    abstained: Tensor | None = None


class Predictor(ABC):
    """Base of the predictors: frozen dataclasses of parameters; they keep no state and change none.

    Attributes:
        remembers: whether its features are those of single adapters, which a memory can keep between evaluations.
        by_class: whether a class is answered by the adapter of its own task, so that a pool can hold the model adapter
            by adapter.
        sums: whether all adapters act on every input at once, their outputs added.
    """

    summary: ClassVar[str] = ""
    remembers: ClassVar[bool] = True
    by_class: ClassVar[bool] = False
    sums: ClassVar[bool] = False

    @property
    def needs_keys(self) -> bool:
        """Whether it looks inputs up among the model's keys (part "class_keys")."""
        return False

    @property
    def anchor(self) -> int:
        """The adapter that is needed whatever the class: a field called ``slot``; -1: none."""
        return int(getattr(self, "slot", -1))

    @abstractmethod
    def predict(self, model: ModelState, features: LazyFeatures) -> Prediction:
        """Answer for one batch.

        Args:
            model: heads, prototypes and the map from classes to tasks.
            features: the batch; asks the backbone only for (sample, adapter) pairs that are needed.
        """


predictors: Registry[type[Predictor]] = Registry("predictor", "cl_adapters.predictors", group="cl_adapters.predictors")


def predictor_from(value: Predictor | str | Mapping[str, Any]) -> Predictor:
    """A predictor from its name, or from a mapping with "type" and its options.

    Raises:
        UnknownName: no such predictor.
        ConfigError: unknown option, wrong type or range.
    """
    return value if isinstance(value, Predictor) else build_named(predictors, value, "predictor")


def predictor_to_plain(predictor: Predictor) -> dict[str, Any]:
    """JSON-ready; :func:`predictor_from` gives it back."""
    return {"type": predictors.name_of(predictor)} | to_plain(predictor)
