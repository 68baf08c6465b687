"""Measure an encoder on what it was not trained on: the figures of the model card.

python -m cl_adapters.benchmarks.glyphs.probe WEIGHTS.safetensors
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from cl_adapters.benchmarks.data.digits import Digits
from cl_adapters.benchmarks.glyphs.batches import IMG_SIZE
from cl_adapters.benchmarks.glyphs.classes import glyph_classes
from cl_adapters.benchmarks.glyphs.encoder import build_encoder, normalise
from cl_adapters.benchmarks.glyphs.render import TEST_FACES, TRAIN_FACES, coverage, render

Split = tuple[Tensor, Tensor]
SEED = 20240602


class Probes:
    """Fixed image sets, and the accuracy of cosine nearest-class-mean on them.

    Args:
        classes: number of classes of the glyph sets.
        train, test: images per class for the means and for the accuracy, each set in its own faces.
    """

    def __init__(self, classes: int = 100, train: int = 8, test: int = 4) -> None:
        everywhere = [
            point
            for point in glyph_classes("pretraining")
            if all(point in coverage(face) for face in (*TRAIN_FACES, *TEST_FACES))
        ]
        self.sets: dict[str, tuple[Split, Split]] = {
            "pretraining classes, new faces": _glyphs(everywhere[:classes], train, test),
            "benchmark classes, new faces": _glyphs(glyph_classes("benchmark")[:classes], train, test),
            "digits": _digits(),
        }

    def accuracies(self, encoder: nn.Module) -> dict[str, float]:
        """Return the nearest-class-mean accuracy of each set, 0 to 1; the encoder's mode is put back."""
        mode = encoder.training
        encoder.eval()
        values = {name: nearest_class_mean(encoder, train, test) for name, (train, test) in self.sets.items()}
        encoder.train(mode)
        return values

    def report(self, encoder: nn.Module) -> str:
        """Return the accuracies as one line."""
        return ", ".join(f"{name} {value:.1%}" for name, value in self.accuracies(encoder).items())


@torch.no_grad()
def nearest_class_mean(encoder: nn.Module, train: Split, test: Split) -> float:
    """Accuracy of the nearest mean of L2-normalised features, by cosine.

    Args:
        encoder: images float32 [B, 3, 32, 32] to features float32 [B, D].
        train: images float32 [N, 3, 32, 32] in 0..1 and labels int64 [N] that give the means.
        test: the same of the images to be classified.
    """
    features, labels = _features(encoder, train[0]), train[1]
    means = torch.zeros(int(labels.max()) + 1, features.shape[1]).index_add_(0, labels, features)
    scores = _features(encoder, test[0]) @ F.normalize(means, dim=1).T
    return float((scores.argmax(1) == test[1]).float().mean())


def _features(encoder: nn.Module, images: Tensor) -> Tensor:
    return torch.cat([F.normalize(encoder(normalise(part)), dim=1) for part in images.split(256)])


def _glyphs(codepoints: Sequence[int], train: int, test: int) -> tuple[Split, Split]:
    rng = np.random.default_rng(SEED)
    return _draw(codepoints, TRAIN_FACES, train, rng), _draw(codepoints, TEST_FACES, test, rng)


def _draw(codepoints: Sequence[int], faces: tuple[str, ...], each: int, rng: np.random.Generator) -> Split:
    images = [render(point, faces[row % len(faces)], rng, IMG_SIZE) for point in codepoints for row in range(each)]
    return _tensor(np.stack(images)), torch.arange(len(codepoints)).repeat_interleave(each)


def _digits() -> tuple[Split, Split]:
    data = Digits().load(0)
    splits = []
    for part in (data.train, data.test):
        images = F.interpolate(_tensor(np.stack(list(part.images))), (IMG_SIZE, IMG_SIZE), mode="bilinear")
        splits.append((images, torch.from_numpy(part.labels)))
    return splits[0], splits[1]


def _tensor(images: npt.NDArray[np.uint8]) -> Tensor:
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255


def main() -> None:
    """Print the accuracies of a weights file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights", type=Path)
    parser.add_argument("--classes", type=int, default=100)
    options = parser.parse_args()
    encoder = build_encoder()
    encoder.load_state_dict({name: value.float() for name, value in load_file(options.weights).items()})
    for name, value in Probes(classes=options.classes).accuracies(encoder).items():
        print(f"{name}: {value:.1%}")


if __name__ == "__main__":
    main()
