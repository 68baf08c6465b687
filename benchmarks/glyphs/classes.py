"""Which characters are classes: look-alikes dropped, one part for the benchmark, one for pre-training.

The lists are frozen in a file, so that they do not move with the version of a font renderer. To make it again:

    python -m cl_adapters.benchmarks.glyphs.classes --out cl_adapters/assets/glyph_classes.json
"""

from __future__ import annotations

import argparse
import functools
import json
import re
import unicodedata
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

import cl_adapters
from cl_adapters.benchmarks.glyphs.render import CANVAS, TEST_FACES, TRAIN_FACES, coverage, glyph_mask

FROZEN = Path(cl_adapters.__file__).parent / "assets" / "glyph_classes.json"

CATEGORIES = frozenset(("Ll", "Lu", "Lt", "Lo", "Sm", "So", "Sc", "Po", "Ps", "Pe"))
NO_CLASSES = re.compile(
    r"DIGIT|NUMBER|\bTONE\b|NUMERAL|FRACTION|SUPERSCRIPT|SUBSCRIPT|MODIFIER|BOX DRAWINGS|BLOCK|QUADRANT|EIGHTH|SHADE"
    r"|BRAILLE|HEXAGRAM|FULL STOP|RATIO|DOT OPERATOR|ELLIPSIS|SPACE|ISOLATED FORM|FINAL FORM|INITIAL FORM|MEDIAL FORM"
)
"""Digits in any form, and shapes that mean something only by their place or that are parts of others."""

LOOK_FACES = ("DejaVuSans", "DejaVuSerif")
ALIKE = 0.93
ALIKE_ACROSS = 0.88
LIKE_DIGIT = 0.78
"""Correlation of blurred bitmaps above which two glyphs look alike: within a part, between parts, to a digit."""

BENCHMARK_SHARE = 50


def stem(codepoint: int) -> str:
    """Return the character's name without case and diacritics: "É" and "e" share one, and so go to the same part."""
    base = ord(unicodedata.normalize("NFD", chr(codepoint))[0])
    name = unicodedata.name(chr(base), f"U+{base:04X}").split(" WITH ")[0]
    return re.sub(r"\b(SMALL|CAPITAL|LETTER|TURNED|REVERSED|INVERTED|ROTATED)\b ?", "", name).strip()


def in_benchmark(codepoint: int) -> bool:
    """The fixed rule of the partition: a checksum of the stem."""
    return zlib.crc32(stem(codepoint).encode()) % 100 < BENCHMARK_SHARE


def shuffled(codepoints: Sequence[int]) -> list[int]:
    """Order by a checksum, so that any first n mix all scripts."""
    return sorted(codepoints, key=lambda point: (zlib.crc32(f"U+{point:04X}".encode()), point))


def looks(codepoints: Sequence[int], face: str) -> npt.NDArray[np.float32]:
    """Return what the glyphs look like to a blurred eye.

    Returns:
        float32 [N, 16 * 16], rows of mean 0 and length 1; zero for glyphs that the face lacks or that have no ink.
    """
    rows = np.zeros((len(codepoints), 256), dtype=np.float32)
    for row, point in enumerate(codepoints):
        if point in coverage(face):
            mask = Image.frombytes("L", (CANVAS, CANVAS), glyph_mask(point, face)).crop((8, 8, 56, 56))
            rows[row] = np.asarray(mask.resize((16, 16), Image.Resampling.BILINEAR), dtype=np.float32).ravel()
    rows -= rows.mean(axis=1, keepdims=True)
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.asarray(rows / np.maximum(norms, 1e-6), dtype=np.float32)


def similarity(left: Sequence[int], right: Sequence[int]) -> npt.NDArray[np.float32]:
    """Return float32 [len(left), len(right)]: the largest correlation over the upright faces."""
    return np.asarray(
        np.maximum.reduce([looks(left, face) @ looks(right, face).T for face in LOOK_FACES]), dtype=np.float32
    )


def derive() -> dict[str, list[int]]:
    """Work out both parts from the installed fonts.

    Returns:
        "benchmark" (covered by all twelve text faces) and "pretraining" code points, in shuffled order.
    """
    everywhere = frozenset.intersection(*(coverage(face) for face in (*TRAIN_FACES, *TEST_FACES)))
    candidates = [point for point in sorted(coverage(LOOK_FACES[0])) if _is_class(point)]
    candidates = _unlike(candidates, [ord(digit) for digit in "0123456789"], LIKE_DIGIT)
    benchmark = _distinct([p for p in candidates if p in everywhere and in_benchmark(p)])
    rest = [p for p in candidates if not in_benchmark(p) and sum(p in coverage(face) for face in TRAIN_FACES) >= 2]
    return {
        "benchmark": shuffled(benchmark),
        "pretraining": shuffled(_distinct(_unlike(rest, benchmark, ALIKE_ACROSS))),
    }


def _is_class(codepoint: int) -> bool:
    character = chr(codepoint)
    if unicodedata.category(character) not in CATEGORIES or NO_CLASSES.search(unicodedata.name(character, "SPACE")):
        return False
    return any(glyph_mask(codepoint, LOOK_FACES[0]))


def _unlike(codepoints: list[int], foreign: list[int], limit: float) -> list[int]:
    """Keep what looks like none of ``foreign``."""
    nearest = similarity(codepoints, foreign).max(axis=1)
    return [point for point, near in zip(codepoints, nearest, strict=True) if near < limit]


def _distinct(codepoints: list[int]) -> list[int]:
    """Keep, in order, what looks like nothing kept before."""
    alike = similarity(codepoints, codepoints) >= ALIKE
    kept: list[int] = []
    for row in range(len(codepoints)):
        if not alike[row, kept].any():
            kept.append(row)
    return [codepoints[row] for row in kept]


@functools.cache
def glyph_classes(part: str) -> tuple[int, ...]:
    """Return the frozen code points of a part, in an order that mixes the scripts.

    Args:
        part: "benchmark" or "pretraining".
    """
    return tuple(json.loads(FROZEN.read_text(encoding="utf-8"))[part])


def main() -> None:
    """Derive the parts and write them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=FROZEN)
    parts = derive()
    parser.parse_args().out.write_text(json.dumps(parts) + "\n", encoding="utf-8")
    print({part: len(points) for part, points in parts.items()})


if __name__ == "__main__":
    main()
