"""The fingerprint of a backbone: what has to be equal, bit for bit, for adapters to fit."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from typing import Any

import torch
from torch import Tensor, nn


def fingerprint_of(encoder: nn.Module, preprocessing: Any, pooling: str) -> str:
    """SHA-256 over every weight and buffer, the preprocessing and the pooling."""
    digest = hashlib.sha256()
    for key, value in sorted(encoder.state_dict().items()):
        if isinstance(value, torch.Tensor):
            plain = _plain(value)
            digest.update(f"{key}:{plain.dtype}:{tuple(plain.shape)}".encode())
            digest.update(plain.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        else:  # what packages for quantised weights keep beside them
            digest.update(f"{key}:{value!r}".encode())
    recipe = None if preprocessing is None else dataclasses.asdict(preprocessing)
    digest.update(json.dumps([recipe, pooling], sort_keys=True).encode())
    return digest.hexdigest()


def _plain(value: Tensor) -> Tensor:
    """The numbers of a tensor; packages for quantised weights have tensors of their own kind, without bytes to read."""
    if type(value) in (torch.Tensor, torch.nn.Parameter) or not hasattr(value, "dequantize"):
        return value
    return value.dequantize()
