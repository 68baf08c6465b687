"""AdaptedNet: a backbone with one adapter and a head as a plain module, for Avalanche's own strategies."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from cl_adapters._seeding import generator
from cl_adapters.adapters.base import AdapterType, adapter_from
from cl_adapters.backbones.frozen import FrozenBackbone
from cl_adapters.backbones.inputs import Inputs
from cl_adapters.bank.bank import AdapterBank, Route
from cl_adapters.config import check_blocks
from cl_adapters.errors import ConfigError, DataError
from cl_adapters.model.facade import AdapterModel
from cl_adapters.model.heads import LinearHead
from cl_adapters.model.state import class_label
from cl_adapters.predictors.fixed import Fixed


class AdaptedNet(nn.Module):
    """A frozen backbone, one adapter and a linear head: inputs in, logits out.

    Its parameters and its ``state_dict`` are those of adapter and head alone, since EWC and GEM keep vectors as long
    as all parameters, trained or not. A deepcopy has a backbone of its own.

    Args:
        backbone: a :class:`FrozenBackbone`, or your own ``nn.Module`` (it is wrapped, and so frozen).
        num_classes: L; class labels are 0 to L - 1.
        adapter: the adapter type, its name, or a mapping with "type" and its options.
        blocks: blocks that get adapters; default all.
        seed: of the initial values and of the adapter's dropout, whose masks depend on it and on the number of training
            passes before. Default that of torch's global generator, as for strategies.

    Raises:
        ConfigError: ``num_classes`` is no whole number from 1, an adapter that cannot be, or a block named twice.
        UnknownName: no such adapter type.
        IncompatibleBackbone: the backbone has no place for adapters of that type.
        ClAdaptersError: blocks that it does not have.
    """

    def __init__(
        self,
        backbone: nn.Module,
        num_classes: int,
        adapter: AdapterType | str | Mapping[str, Any] = "bottleneck",
        blocks: Sequence[int] | None = None,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(num_classes, int) or num_classes < 1:
            raise ConfigError(
                f"num_classes must be a whole number from 1 (the largest label plus 1), got {num_classes!r}"
            )
        check_blocks(blocks)
        self.seed = seed = torch.initial_seed() if seed is None else seed
        self._passes = 0
        self._frozen = (FrozenBackbone.wrap(backbone),)  # in a tuple: no submodule, so no parameters of this one
        self.bank = AdapterBank(self.backbone, adapter_from(adapter), blocks)
        self.bank.add_slot(self.bank.fresh(generator(seed, "adapter")))
        self.head = LinearHead(self.backbone.num_features)
        self.head.grow(num_classes, generator(seed, "head"))
        self.head.to(self.backbone.device)

    @property
    def backbone(self) -> FrozenBackbone:
        """The frozen backbone."""
        return self._frozen[0]

    def forward(self, x: Inputs) -> Tensor:
        """Logits float32 [B, L], indexed by class label; with the adapter's dropout while training.

        Args:
            x: B inputs, as :meth:`FrozenBackbone.forward` takes them.

        Raises:
            ClAdaptersError: the input's shape is not the backbone's.
        """
        draw = None
        if self.training:  # made anew each time: a copy draws what the original would
            draw = generator(self.seed, "dropout", self._passes, device=self.backbone.device)
            self._passes += 1
        with self.bank.route(Route.single(0), draw):
            f_BD = self.backbone(x)
        logits: Tensor = self.head(f_BD)
        return logits.float()

    def as_model(self, *tasks: Sequence[int], class_names: Mapping[int, str] | None = None) -> AdapterModel:
        """A copy of what was trained as an :class:`AdapterModel`: it predicts files, saves, and becomes a pool.

        Args:
            tasks: class labels of each task, in the order of the model's columns; none: all labels as one task.
            class_names: class label to name.

        Raises:
            DataError: a task without labels, or a label that the head does not have or that is named twice.
        """
        model = AdapterModel(self.backbone, AdapterBank(self.backbone, self.bank.adapter, self.bank.blocks))
        known = range(self.head.num_classes)
        parts = [[class_label(label, "a class of as_model") for label in labels] for labels in tasks or [known]]
        wrong = [label for label, times in Counter(chain(*parts)).items() if label not in known or times > 1]
        if wrong:
            raise DataError(f"as_model takes each of the labels 0 to {known[-1]} at most once, got {wrong[0]}")
        for labels in parts:
            model.add_task(labels)
        assert model.bank is not None
        model.bank.add_slot(self.bank.export(0))
        model.assign_new_slots(0)
        with torch.no_grad():
            model.head.weight = nn.Parameter(self.head.weight[model.classes])
            model.head.bias = nn.Parameter(self.head.bias[model.classes])
        model.class_names.update(class_names or {})
        model.predictor = Fixed(slot=0)
        return model

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> AdaptedNet:
        """Move the backbone along: ``to``, ``cuda`` and the like come here."""
        for module in (self.backbone, self):
            nn.Module._apply(module, fn, recurse)
        return self
