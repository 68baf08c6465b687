"""A mini-batch of Avalanche, (inputs, labels, ...), checked and on its device; the inputs may be a dictionary."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import default_collate

from cl_adapters.backbones.frozen import FrozenBackbone
from cl_adapters.backbones.inputs import Inputs, as_inputs, to_device
from cl_adapters.backbones.partial import checked_inputs
from cl_adapters.errors import DataError
from cl_adapters.model.state import LABELS


def sample_batch(batch: Any) -> tuple[Inputs, Tensor]:
    """Inputs and class labels [B] of a mini-batch.

    Raises:
        DataError: it is no sequence of the two, or one of them cannot be used; says what was found.
    """
    if isinstance(batch, Mapping) or not isinstance(batch, list | tuple) or len(batch) < 2:
        found = f"a dictionary of {list(batch)}" if isinstance(batch, Mapping) else f"a {type(batch).__name__}"
        raise DataError(
            f"a mini-batch came as {found}; expected are samples (inputs, label), where inputs may be a dictionary of "
            "what the backbone takes: wrap the data set, or give it a collate_fn that returns [inputs, labels]"
        )
    try:
        labels_B = torch.as_tensor(batch[1])
    except (RuntimeError, TypeError, ValueError) as error:
        raise DataError(f"the labels of a mini-batch came as {type(batch[1]).__name__}; {LABELS}") from error
    if labels_B.ndim != 1:
        raise DataError(f"the labels of a mini-batch came in the shape {list(labels_B.shape)}, expected [B]; {LABELS}")
    wrong = (labels_B < 0).nonzero().flatten().tolist()
    if wrong:
        raise DataError(f"sample {wrong[0]} of the batch has label {labels_B[wrong[0]].item()!r}; {LABELS}")
    return as_inputs(batch[0]), labels_B


def on_device(batch: Any, device: torch.device) -> list[Any]:
    """A mini-batch as a list of its inputs, labels and what else it has, on a device.

    Raises:
        DataError: see :func:`sample_batch`.
    """
    x, labels_B = sample_batch(batch)
    rest = [each.to(device) if isinstance(each, Tensor) else each for each in batch[2:]]
    return [to_device(x, device), labels_B.to(device), *rest]


def check_first(dataset: Any, backbone: FrozenBackbone) -> None:
    """Check that a backbone takes the first sample of a data set that has one.

    Raises:
        DataError: it does not, or the sample cannot be put into a batch.
    """
    try:
        batch = getattr(dataset, "collate_fn", default_collate)([dataset[0]])
    except TypeError as error:  # of default_collate
        raise DataError(f"a training sample cannot be put into a batch: {error}") from error
    x, _ = sample_batch(batch)
    checked_inputs(backbone.encoder, x, backbone.preprocessing, backbone.name)
