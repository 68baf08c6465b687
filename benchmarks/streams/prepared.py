"""A benchmark as one backbone takes it: the transforms of its images, or the tokens of its texts."""

from __future__ import annotations

from typing import NamedTuple

from cl_adapters.backbones.frozen import FrozenBackbone
from cl_adapters.backbones.text import TextPreprocessing
from cl_adapters.benchmarks.base import BenchmarkData
from cl_adapters.benchmarks.streams.augmentation import train_transform
from cl_adapters.benchmarks.streams.datasets import Transform
from cl_adapters.benchmarks.streams.tokenised import tokenised
from cl_adapters.errors import ConfigError


class Prepared(NamedTuple):
    """A benchmark whose texts have their tokens; or the transforms of its images, the first with augmentation."""

    data: BenchmarkData
    train_transform: Transform | None
    eval_transform: Transform | None


def prepare(data: BenchmarkData, backbone: FrozenBackbone) -> Prepared:
    """Make a benchmark ready for a backbone.

    Raises:
        ConfigError: the backbone takes no samples of this kind.
    """
    check_modality(data, backbone)
    preprocessing = backbone.preprocessing
    assert preprocessing is not None
    if isinstance(preprocessing, TextPreprocessing):
        return Prepared(tokenised(data, preprocessing), None, None)
    return Prepared(data, train_transform(preprocessing, data.augmentation), preprocessing.eval_transform())


def check_modality(data: BenchmarkData, backbone: FrozenBackbone) -> None:
    """Check that a backbone takes what a benchmark has.

    Raises:
        ConfigError: it does not.
    """
    preprocessing = backbone.preprocessing
    if preprocessing is None:
        raise ConfigError(
            f"backbone {backbone.name!r} has no preprocessing, so it takes no {data.modality}s; load one by name"
        )
    if preprocessing.modality != data.modality:
        way = "hf:FOLDER_OR_NAME" if data.modality == "text" else "vit_glyph_tiny or timm:MODEL"
        raise ConfigError(
            f"benchmark {data.name!r} has {data.modality}s, but backbone {backbone.name!r} takes "
            f"{preprocessing.modality}s: choose a backbone of {data.modality}s, such as {way}"
        )
