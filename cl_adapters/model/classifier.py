"""Classifier: a model's state with the predictor by which it answers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cl_adapters.backbones.frozen import FrozenBackbone
from cl_adapters.backbones.inputs import Inputs, as_inputs, batch_size, take, to_device
from cl_adapters.backbones.partial import checked_inputs
from cl_adapters.bank.bank import AdapterBank
from cl_adapters.config import counted
from cl_adapters.errors import ClAdaptersError
from cl_adapters.features import FeatureMemory, LazyFeatures
from cl_adapters.model.state import ModelState
from cl_adapters.parts.abstention import Abstention
from cl_adapters.predictors.base import Prediction, Predictor
from cl_adapters.predictors.fixed import Fixed


class Classifier(ModelState):
    """From a batch to logits.

    Attributes:
        predictor: the rule by which it answers.
    """

    def __init__(self, backbone: FrozenBackbone, bank: AdapterBank | None = None) -> None:
        super().__init__(backbone, bank)
        self.predictor: Predictor = Fixed(slot=-1, head="prototype")

    def answer(
        self,
        x: Inputs,
        memory: FeatureMemory | None = None,
        samples: Sequence[int] | None = None,
        *,
        predictor: Predictor | None = None,
    ) -> Prediction:
        """Predict one batch and say how; changes no state.

        Args:
            x: B inputs, as :meth:`FrozenBackbone.forward` takes them.
            memory: features known from earlier evaluations, and
            samples: the B numbers under which it knows them.
            predictor: another predictor than the model's own.

        Raises:
            ClAdaptersError: no task was learned yet; the memory is of another model or batch; or logits are NaN.
            DataError: inputs that the backbone does not take, or numbers in them that are not finite.
        """
        if not self.classes:
            raise ClAdaptersError("this model knows no class yet: train it on a task first")
        x = as_inputs(x)
        if memory is not None:
            memory.check(self, batch_size(x), samples)
        if not batch_size(x):
            return self._no_answer()
        with torch.inference_mode():
            lazy = LazyFeatures(self, to_device(x, self.device), memory, samples)
            prediction = (predictor or self.predictor).predict(self, lazy)
            if bool(prediction.logits.isnan().any()):
                raise ClAdaptersError(
                    "logits are no numbers (NaN): training has diverged (take a smaller lr), or the model's numbers "
                    "overflow"
                )
            if "abstention" not in self.parts:
                return prediction
            return self.part("abstention", Abstention).applied(self, lazy, prediction)

    def forward(self, x: Inputs) -> Tensor:
        """Logits float32 [B, C]; columns are ``classes``. Before the first task, a pass that ends in no column."""
        if not self.classes:
            with torch.inference_mode():
                return self.features(to_device(as_inputs(x), self.device), None).float()[:, :0]
        return self.answer(x).logits.float()

    def predict(self, x: Inputs, batch: int = 64, *, predictor: Predictor | None = None) -> Tensor:
        """Logits float32 [B, C] on the CPU, in batches of ``batch``; columns are ``classes``.

        Raises:
            ConfigError: ``batch`` is less than 1.
            DataError, ClAdaptersError: as :meth:`answer`.
        """
        backbone = self.backbone  # the whole is checked here, so that messages count in it and not in a batch
        x = checked_inputs(backbone.encoder, x, backbone.preprocessing, backbone.name)
        rows = torch.arange(batch_size(x)).split(counted(batch, "batch"))
        return torch.cat([self.answer(take(x, part), predictor=predictor).logits.float().cpu() for part in rows])

    def _no_answer(self) -> Prediction:
        """The prediction for no input."""
        return Prediction(
            logits=torch.empty(0, len(self.classes), device=self.device),
            adapter=torch.empty(0, dtype=torch.long),
            passes=torch.empty(0),
            abstained=torch.empty(0, dtype=torch.bool) if "abstention" in self.parts else None,
        )
