"""Representation descriptors of SEMA: is what an adapter sees like what it was trained on?

Source: SEMA, released code sema_components.py (descriptor, records) and sema_block.py:112-171, 274-290 (z-scores).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cl_adapters.errors import ClAdaptersError, TrainingDiverged
from cl_adapters.model.alignment import cosine_lr
from cl_adapters.parts.base import parts
from cl_adapters.parts.per_block import PerBlock, saved_entries, widths_of

ROUNDING = 1e-6
"""Relative size below which a spread of float32 errors is taken for rounding."""


def pooled(x_BND: Tensor) -> Tensor:
    """p [B, D], the mean over all tokens of [B, N, D], or over all places of a feature map [B, D, H, W]."""
    return x_BND.mean((2, 3)) if x_BND.ndim == 4 else x_BND.mean(1)


class Records(nn.Module):
    """The errors of the last images, for z-scores.

    Filled until full: of the batch that overfills it only the first errors are kept. From then on it slides.
    Saved with the model; the released code loses its records, so that after loading nothing would ever expand.

    Args:
        size: errors kept at most.
    """

    values: Tensor

    def __init__(self, size: int = 500) -> None:
        super().__init__()
        if size < 3:
            raise ClAdaptersError(f"records need room for 3 errors or more to give z-scores, got {size}")
        self.size = size
        self.register_buffer("values", torch.empty(0))

    def __len__(self) -> int:
        return len(self.values)

    @torch.no_grad()
    def add(self, e_B: Tensor) -> None:
        """Take in the errors [B] of one batch."""
        joined = torch.cat([self.values, e_B.detach().to(self.values)])
        self.values = (joined[: self.size] if len(self) < self.size else joined[-self.size :]).clone()

    @property
    def mean(self) -> Tensor:
        """Mean of what is there, float []."""
        return self.values.mean()

    @property
    def std(self) -> Tensor:
        """Unbiased standard deviation of what is there, float []."""
        return self.values.std()

    @torch.no_grad()
    def z(self, e_B: Tensor) -> Tensor:
        """|e - mean| / std, float [B]; zeros while 2 or fewer errors are known.

        The absolute value is the released code's: an unusually low error counts as well. Where all known errors are
        the same, any other error is far away (z large or infinite) and that same error is at 0.
        """
        if len(self) <= 2:
            return torch.zeros_like(e_B)
        distance_B = (e_B - self.mean).abs()
        spread = torch.maximum(self.std, ROUNDING * self.mean.abs())
        return torch.where(distance_B == 0, 0.0, distance_B / spread)


class Descriptor(nn.Module):
    """Linear autoencoder D -> d -> D with biases and no activation, and the records of its errors.

    Attributes:
        encode: weight [d, D], bias [d].
        decode: weight [D, d], bias [D].
        records: of the images that it was trained on.
    """

    def __init__(self, width: int, dim: int, buffer: int) -> None:
        super().__init__()
        self.encode = nn.utils.skip_init(nn.Linear, width, dim)
        self.decode = nn.utils.skip_init(nn.Linear, dim, width)
        self.records = Records(buffer)

    @torch.no_grad()
    def draw(self, generator: torch.Generator) -> None:
        """Start values: weights Kaiming-uniform with a = sqrt(5), so U(+-1/sqrt(inputs)); biases 0."""
        for layer in (self.encode, self.decode):
            bound = layer.in_features**-0.5
            layer.weight.uniform_(-bound, bound, generator=generator)
            layer.bias.zero_()

    def forward(self, p_BD: Tensor) -> Tensor:
        """Mean squared error over D of the reconstruction, float [B]."""
        off_BD: Tensor = self.decode(self.encode(p_BD)) - p_BD
        return off_BD.square().mean(1)


@parts.register("novelty")
class Descriptors(PerBlock):
    """Descriptors, one per adapter at every expandable block; needed to train, never to predict.

    Args:
        widths: expandable block to the width D of its sites' input.
        dim: width d inside the descriptors.
        buffer: errors that each remembers.

    Raises:
        ClAdaptersError: no expandable block, or sizes that make no sense.
    """

    def __init__(self, widths: Mapping[int, int], dim: int, buffer: int) -> None:
        super().__init__(widths)
        if dim < 1:
            raise ClAdaptersError(f"the width inside the descriptors must be 1 or more, got {dim}")
        self.dim = dim
        self.buffer = Records(buffer).size

    def grow(self, block: int, slot: int, generator: torch.Generator) -> list[nn.Parameter]:
        """Add the descriptor of a new adapter at a block; its start values are drawn on the CPU.

        Returns its four parameters, ready to be trained.

        Raises:
            ClAdaptersError: the block is not expandable, or has a descriptor of that slot.
        """
        new = Descriptor(self.width(block), self.dim, self.buffer)
        new.draw(generator)
        return self._enter(block, slot, new)

    def descriptor(self, block: int, slot: int) -> Descriptor:
        """One descriptor.

        Raises:
            ClAdaptersError: there is none.
        """
        if slot not in self.slots(block):
            raise ClAdaptersError(f"no descriptor of slot {slot} at block {block}; slots there: {self.slots(block)}")
        found = self.entries(block)[str(slot)]
        assert isinstance(found, Descriptor)
        return found

    @torch.no_grad()
    def z(self, block: int, p_BD: Tensor) -> Tensor:
        """Scores [K, B], one row per descriptor of the block (see :meth:`Records.z`), of pooled inputs [B, D].

        Raises:
            ClAdaptersError: the block has no descriptor.
        """
        found = [self.descriptor(block, slot) for slot in self.slots(block)]
        if not found:
            raise ClAdaptersError(f"block {block} has no descriptor yet: grow one and train it first")
        return torch.stack([descriptor.records.z(descriptor(p_BD)) for descriptor in found])

    def score(self, block: int, p_BD: Tensor) -> float:
        """How new a batch is: the batch mean of z under the descriptor that knows it best.

        Raises:
            ClAdaptersError: the block has no descriptor.
        """
        return float(self.z(block, p_BD).mean(1).min())

    def description(self) -> dict[str, Any]:
        """Sizes, and slots per block."""
        return super().description() | {"dim": self.dim, "buffer": self.buffer}

    @classmethod
    def restore(cls, description: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Descriptors:
        """The descriptors of which these are description and tensors, records included; frozen, as after every task."""
        descriptors = cls(widths_of(description), int(description["dim"]), int(description["buffer"]))
        for block, slot, own in saved_entries(description, tensors):
            new = Descriptor(descriptors.width(block), descriptors.dim, descriptors.buffer)
            new.records.values = own["records.values"]
            for name, parameter in new.named_parameters():
                parameter.data = own[name]
            descriptors._enter(block, slot, new)
        descriptors.freeze()
        return descriptors


def train_descriptors(
    descriptors: Descriptors,
    pairs: Sequence[tuple[int, int]],
    batches: Callable[[int], Iterable[Mapping[int, Tensor]]],
    *,
    epochs: int,
    lr: float,
    momentum: float,
    weight_decay: float,
    report: Callable[[int, float], None] | None = None,
) -> None:
    """Train descriptors side by side, each on its own error, and record the errors.

    Plain SGD; the loss is the sum over the pairs of the mean batch error. An image's error is recorded as it was
    before the step, in all epochs, so that in the end the records hold the last images of the last epoch.

    Args:
        descriptors: holds the descriptors.
        pairs: (block, slot) of those that are trained.
        batches: of an epoch (0-based): per batch the pooled input [B, D] of each block; no gradient flows into it.
        epochs: passes.
        lr: learning rate, cosine to 0 over the epochs.
        momentum: of SGD.
        weight_decay: L2 factor, on weights and biases.
        report: told the epoch and its mean loss.

    Raises:
        TrainingDiverged: a loss that is not finite; those errors are not recorded.
    """
    trained = [descriptors.descriptor(*pair) for pair in pairs]
    if not trained or epochs < 1:
        return
    parameters = [parameter for descriptor in trained for parameter in descriptor.parameters()]
    optimizer = torch.optim.SGD(parameters, lr, momentum, weight_decay=weight_decay)
    for epoch in range(epochs):
        for group in optimizer.param_groups:
            group["lr"] = cosine_lr(lr, epoch, epochs)
        losses = []
        for batch in batches(epoch):
            errors = [descriptor(batch[block].detach()) for (block, _), descriptor in zip(pairs, trained, strict=True)]
            loss = torch.stack([e_B.mean() for e_B in errors]).sum()
            losses.append(float(loss.detach()))
            _check(losses[-1], epoch, lr)
            optimizer.zero_grad()
            loss.backward()
            for descriptor, e_B in zip(trained, errors, strict=True):
                descriptor.records.add(e_B)
            optimizer.step()
        if report is not None and losses:
            report(epoch, sum(losses) / len(losses))


def _check(loss: float, epoch: int, lr: float) -> None:
    if not abs(loss) < float("inf"):
        raise TrainingDiverged(
            f"the loss of the descriptors became {loss} in epoch {epoch + 1}; lower their learning rate (now {lr})"
        )
