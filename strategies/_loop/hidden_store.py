"""HiddenStore: activations of a data set at one depth of the backbone, in memory or, when large, on disk."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from cl_adapters.errors import ClAdaptersError


class HiddenStore:
    """K views of N samples.

    Float32 in memory up to a limit; above it, half precision in an unnamed temporary file that is memory-mapped and
    gone when the store or the process is (``TMPDIR`` says where).

    Args:
        views: K, augmented views of every sample.
        samples: N.
        shape: of one activation, for a ViT [tokens, D].
        memory_mb: limit in MiB of float32.
    """

    def __init__(self, views: int, samples: int, shape: Sequence[int], memory_mb: float) -> None:
        self._data: npt.NDArray[Any]
        self.on_disk = 4 * views * samples * int(np.prod(shape)) > memory_mb * 2**20
        if self.on_disk:
            self._file = tempfile.TemporaryFile(prefix="cl-adapters-")  # noqa: SIM115  # lives as long as the store
            self._data = np.memmap(self._file, np.float16, "w+", shape=(views, samples, *shape))
        else:
            self._data = np.empty((views, samples, *shape), np.float32)

    def write(self, view: int, start: int, h_BX: Tensor) -> None:
        """Put B consecutive samples of one view in their place.

        Raises:
            ClAdaptersError: a number too large for half precision.
        """
        if self.on_disk and bool((h_BX.abs() > torch.finfo(torch.float16).max).any()):  # NaN: no token there
            raise ClAdaptersError(
                "activations are too large for half precision: raise cache_memory_mb so that they fit into memory"
            )
        self._data[view, start : start + len(h_BX)] = h_BX.float().cpu().numpy()

    def read(self, views_B: Tensor, samples_B: Tensor) -> Tensor:
        """Float32 [B, ...] on the CPU."""
        return torch.from_numpy(np.asarray(self._data[views_B.numpy(), samples_B.numpy()], np.float32))
