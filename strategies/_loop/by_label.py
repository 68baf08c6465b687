"""The strategy's model as Avalanche's plugins take it: logits by class label, with gradients."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from cl_adapters.backbones.inputs import Inputs
from cl_adapters.bank.bank import Routes
from cl_adapters.errors import DataError
from cl_adapters.model.facade import AdapterModel

UNSEEN = -1000.0
"""Logit of a class label that was not learned: no probability, but a finite number, as in Avalanche's own heads."""
WIDEST = 65_536
"""Logits by class label are not made wider than this."""


@dataclass
class Pass:
    """One forward pass of the strategy, and what it went through.

    Attributes:
        training: as the strategy trains, or by the predictor.
        routes: adapters of a pass in training.
        dropout: generator of their dropout masks.
        start: the inputs are those of this block; None: images.
        width: L at least.
        features: float [B, D], afterwards; in training only.
        logits: float [B, C] by column, afterwards.
    """

    training: bool
    routes: Routes | None = None
    dropout: torch.Generator | None = None
    start: int | None = None
    width: int = 0
    features: Tensor = field(init=False)
    logits: Tensor = field(init=False)


class ByLabel(AdapterModel):
    """The same model as the one it is made of, with which it shares all its state; only its outputs differ.

    In training mode it answers as the strategy trains (its adapters and the linear head, without their dropout), in
    evaluation mode by the model's predictor; both with gradients, outside ``no_grad``. Its ``named_parameters`` are
    those of adapters, heads and parts, since plugins keep vectors as long as all of them; its ``parameters`` are what
    of that needs gradients now, since plugins differentiate with respect to all of them.
    """

    trained: bool = False
    """Whether a strategy has trained it, and so left here through which adapters."""
    places: dict[str, int]
    """Of the parameters, in the order in which they came."""
    trained_routes: Routes | None = None

    @classmethod
    def of(cls, model: AdapterModel) -> ByLabel:
        """The other face of a model."""
        face = cls.__new__(cls)
        object.__setattr__(face, "__dict__", model.__dict__)
        face.__dict__.setdefault("places", {})
        return face

    def forward(self, x: Inputs, run: Pass | None = None) -> Tensor:
        """Logits float [B, L] indexed by class label, :data:`UNSEEN` where none was learned.

        Args:
            x: B inputs, as :meth:`FrozenBackbone.forward` takes them.
            run: how the strategy itself passes them, filled with what was seen on the way.

        Returns:
            To the strategy, where labels beyond :data:`WIDEST` are known, their argmax int64 [B] in place of logits.

        Raises:
            DataError: logits would be wider than :data:`WIDEST`, for all others.
        """
        own = run or Pass(training=self.training and self.trained, routes=self.trained_routes)
        if own.training and self.head.num_classes == len(self.classes):
            own.features = self.features(x, own.routes, own.dropout, start=own.start)
            own.logits = self.head(own.features)
        elif not self.classes:  # Avalanche's metrics ask for a pass before the first task
            own.logits = self.features(x, None).float()[:, :0]
        else:
            with torch.inference_mode(not torch.is_grad_enabled()):
                own.logits = self.answer_with_grad(x).logits.float()
        return self.by_label(own.logits, own.width, exact=run is None)

    def by_label(self, logits_BC: Tensor, width: int = 0, *, exact: bool = True) -> Tensor:
        """Logits by column [B, C] as logits by class label [B, L], L at least ``width``.

        Where that is too wide, class labels int64 [B] of the largest logits, or with ``exact`` an error.

        Raises:
            DataError: that.
        """
        width = max([*self.classes, width - 1, -1]) + 1
        labels = torch.tensor(self.classes, dtype=torch.long, device=logits_BC.device)
        if width > WIDEST:
            if exact:
                raise DataError(
                    f"logits by class label would be {width:,} wide: number the classes from 0 (nc_benchmark(..., "
                    "class_ids_from_zero_from_first_exp=True)), or take strategy.model.predict(x), which has one "
                    "column for each of strategy.model.classes"
                )
            return labels[logits_BC.argmax(1)]
        wide_BL = logits_BC.new_full((len(logits_BC), width), UNSEEN)
        return wide_BL.index_copy(1, labels, logits_BC)

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """All but the frozen backbone's, in the order in which they came: plugins compare them one by one.

        A parameter that grows, as a head does, keeps its place.
        """
        found = {
            name: parameter
            for name, parameter in super().named_parameters(prefix, recurse, remove_duplicate)
            if not name.removeprefix(prefix).removeprefix(".").startswith("backbone.")
        }
        yield from sorted(found.items(), key=lambda entry: self.places.get(entry[0], len(self.places)))

    def note_places(self) -> None:
        """Note which parameters have come by now."""
        for name, _ in self.named_parameters():
            self.places.setdefault(name, len(self.places))

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """Those that need gradients now."""
        return (parameter for _, parameter in self.named_parameters(recurse=recurse) if parameter.requires_grad)
