"""A training loop as data: what is trained, for how long, on which loss."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cl_adapters.model.alignment import cosine_lr


@dataclass(frozen=True)
class Batch:
    """What a loss sees of one mini-batch.

    Attributes:
        features: float [B, D].
        logits: float [B, C], one column per class so far.
        columns: int64 [B], the right column of each sample.
        criterion: cross-entropy, or what the user gave in its place.
    """

    features: Tensor
    logits: Tensor
    columns: Tensor
    criterion: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy


Loss = Callable[[Batch], Tensor]
Schedule = Callable[[float, int, int], float]
"""(lr, epoch, epochs) to the learning rate of that epoch, 0-based."""


def constant_lr(lr: float, epoch: int, epochs: int) -> float:
    """The same learning rate in every epoch (a :data:`Schedule`)."""
    return lr


@dataclass(frozen=True, kw_only=True)
class ParamGroup:
    """Parameters that share a learning rate (that of the phase's start) and an L2 factor."""

    params: Sequence[nn.Parameter]
    lr: float
    weight_decay: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Phase:
    """One training loop over the experience.

    Attributes:
        name: for progress and logs.
        epochs: passes over the data.
        groups: what is trained; everything else stays as it is.
        loss: scalar loss of a batch.
        schedule: of the learning rate; None: that of the settings, without settings :func:`cosine_lr`.
        start: the first block in which anything is trained (the backbone's ``depth``: only the head is); what comes
            before it may be computed once. None: from the images every time.
    """

    name: str
    epochs: int
    groups: Sequence[ParamGroup]
    loss: Loss
    schedule: Schedule | None = None
    start: int | None = None

    @property
    def num_parameters(self) -> int:
        """Numbers that are trained."""
        return sum(parameter.numel() for group in self.groups for parameter in group.params)

    def install(self, optimizer: torch.optim.Optimizer) -> None:
        """Give the optimizer this phase's parameters, in place: schedulers and loggers keep their reference."""
        optimizer.state.clear()
        optimizer.param_groups.clear()
        for group in self.groups:
            optimizer.add_param_group(
                {"params": list(group.params), "lr": group.lr, "weight_decay": group.weight_decay}
            )

    def set_epoch(self, optimizer: torch.optim.Optimizer, epoch: int, share: float = 1.0) -> None:
        """Set the learning rates of ``epoch`` (0-based), or a share of them."""
        schedule = self.schedule or cosine_lr
        for group, live in zip(self.groups, optimizer.param_groups, strict=True):
            live["lr"] = share * schedule(group.lr, epoch, self.epochs)


def current_task_loss(batch: Batch, known: int, returning: Sequence[int] = ()) -> Tensor:
    """Cross-entropy over the columns of the current task alone.

    Leaving the other columns out is what setting them to minus infinity does: they get no probability and exactly no
    gradient. Samples of other classes, which a replay plugin brings, are judged over all columns; every sample counts
    the same.

    Args:
        batch: what the loss sees.
        known: the first so many columns are of earlier tasks.
        returning: those of them whose classes are in the current task again, rising.
    """
    own: slice | Tensor = slice(known, None)
    place_B = batch.columns - known  # among the columns of the task; negative: of another
    if returning:
        classes = batch.logits.shape[1]
        own = torch.tensor([*returning, *range(known, classes)], device=batch.logits.device)
        place_C = torch.full((classes,), -1, device=own.device)
        place_C[own] = torch.arange(len(own), device=own.device)
        place_B = place_C[batch.columns]
    new_B = place_B >= 0
    if bool(new_B.all()):
        return batch.criterion(batch.logits[:, own], place_B)
    old = batch.criterion(batch.logits[~new_B], batch.columns[~new_B])
    if not bool(new_B.any()):
        return old
    new = batch.criterion(batch.logits[:, own][new_B], place_B[new_B])
    share = float(new_B.float().mean())
    return share * new + (1 - share) * old


def all_classes_loss(batch: Batch) -> Tensor:
    """Cross-entropy over all columns so far."""
    return batch.criterion(batch.logits, batch.columns)
