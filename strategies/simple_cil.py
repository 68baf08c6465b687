"""SimpleCIL: class means of the frozen backbone. The smallest complete strategy: read this one first.

Source: Zhou et al. 2024, "Revisiting class-incremental learning with pre-trained models", eq. 2.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar

from cl_adapters.predictors.base import Predictor
from cl_adapters.predictors.fixed import Fixed
from cl_adapters.strategies.base import AdapterStrategy, Returning, strategies
from cl_adapters.strategies.phases import Phase


@strategies.register("simple_cil")
class SimpleCIL(AdapterStrategy):
    """Prototypes only: nothing is trained, one pass over the data, one pass per prediction."""

    summary: ClassVar[str] = "prototypes of the frozen backbone, no training"
    classes_return: ClassVar[Returning] = "merged"

    def grow(self, task: int) -> None:
        """Nothing grows."""

    def phases(self, task: int) -> Iterable[Phase]:
        """Nothing is trained."""
        return ()

    def consolidate(self, task: int) -> None:
        """Keep the mean feature of every class."""
        with self.timings.part("statistics"):
            self.keep_means(self.model.prototypes, *self.training_features(None))

    def predictor(self, task: int, training: bool) -> Predictor:
        """Cosine to the prototypes under the bare backbone."""
        return Fixed(slot=-1, head="prototype")
