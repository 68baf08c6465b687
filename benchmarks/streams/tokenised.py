"""Texts as token ids, computed once and read back from disk."""

from __future__ import annotations

import dataclasses
import os
import shutil
import tempfile
import weakref
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from cl_adapters.backbones.text import TextPreprocessing
from cl_adapters.backbones.tokens import NO_TOKEN, mask_of
from cl_adapters.benchmarks.base import BenchmarkData, TextSet
from cl_adapters.errors import DataError

CHUNK = 1024
"""Texts that are tokenised together."""


@dataclasses.dataclass(frozen=True)
class TokenSet(TextSet):
    """Texts with their tokens, which lie end to end in a file that is memory-mapped.

    Attributes:
        tokens: int32 [T], the tokens of all texts.
        starts: int64 [N + 1], where each text begins, and T.
    """

    tokens: npt.NDArray[np.int32] = dataclasses.field(default_factory=lambda: np.empty(0, np.int32))
    starts: npt.NDArray[np.int64] = dataclasses.field(default_factory=lambda: np.zeros(1, np.int64))

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """Tokens of each text, int64 [N]."""
        return np.diff(self.starts)

    def row(self, index: int, width: int) -> npt.NDArray[np.int64]:
        """The tokens of one text, int64 [width], -1 behind its end."""
        tokens = self.tokens[self.starts[index] : self.starts[index + 1]]
        padded = np.full(width, NO_TOKEN, np.int64)
        padded[: len(tokens)] = tokens
        return padded


def tokenised(data: BenchmarkData, preprocessing: TextPreprocessing) -> BenchmarkData:
    """A benchmark of texts with their tokens: its two sets are :class:`TokenSet`.

    The files lie in a temporary folder (``TMPDIR`` says where), which goes when the sets do.

    Raises:
        DataError: the samples are no texts.
    """
    sets = []
    for part in (data.train, data.test):
        if not isinstance(part, TextSet):
            raise DataError(f"{data.name}: {part.modality}s cannot be tokenised")
        sets.append(_token_set(part, preprocessing))
    return dataclasses.replace(data, train=sets[0], test=sets[1])


def _token_set(part: TextSet, preprocessing: TextPreprocessing) -> TokenSet:
    folder = Path(tempfile.mkdtemp(prefix="cl-adapters-tokens-"))
    try:
        lengths = _write(part.texts, folder / "tokens", preprocessing)
        starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths, dtype=np.int64)])
        tokens: npt.NDArray[np.int32] = np.memmap(folder / "tokens", np.int32, "r")
        made = TokenSet(part.texts, part.labels, part.names, tokens, starts)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    weakref.finalize(made, _remove, folder, os.getpid())
    return made


def _remove(folder: Path, owner: int) -> None:
    """Delete the folder, but not from a loader's worker, whose copy of the set ends earlier."""
    if os.getpid() == owner:
        shutil.rmtree(folder, ignore_errors=True)


def _write(texts: Sequence[str], path: Path, preprocessing: TextPreprocessing) -> npt.NDArray[np.int64]:
    """Write the tokens of all texts one after the other; returns how many each has, int64 [N]."""
    lengths = []
    with path.open("wb") as file:
        for start in range(0, len(texts), CHUNK):
            tokens_BN = preprocessing.encode(texts[start : start + CHUNK])
            mask_BN = mask_of(tokens_BN)
            file.write(tokens_BN[mask_BN].numpy().astype(np.int32).tobytes())
            lengths.append(mask_BN.sum(1).numpy())
    return np.concatenate(lengths)
