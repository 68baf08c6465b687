"""The glyph renderer, the partition of its characters, and the ``glyphs`` benchmark."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import numpy as np
import pytest

from cl_adapters.benchmarks.base import benchmarks
from cl_adapters.benchmarks.data.glyphs import Glyphs
from cl_adapters.benchmarks.glyphs.batches import faces_of
from cl_adapters.benchmarks.glyphs.classes import (
    ALIKE_ACROSS,
    LIKE_DIGIT,
    derive,
    glyph_classes,
    in_benchmark,
    similarity,
    stem,
)
from cl_adapters.benchmarks.glyphs.render import (
    CM_FACES,
    STIX_FACES,
    TEST_FACES,
    TRAIN_FACES,
    Style,
    coverage,
    glyph_mask,
    render,
)
from cl_adapters.config import build, to_plain
from cl_adapters.errors import ConfigError

SMALL = Glyphs(classes=12, tasks=3, train_per_class=10, test_per_class=4)
DIGITS = [ord(digit) for digit in "0123456789"]
STILL = Style(degrees=0, scale=(1, 1), stretch=0, shear=0, shift=0, thickness=(0, 0), contrast=(255, 255), dark_ink=0)
STILL = replace(STILL, tint=0, gradient=0, noise=(0, 0))


def test_is_registered_and_survives_plain_configuration() -> None:
    assert benchmarks.get("glyphs") is Glyphs
    assert build(Glyphs, to_plain(SMALL)) == SMALL


def test_counts_tasks_and_types() -> None:
    data = SMALL.load(0)
    assert (len(data.train), len(data.test)) == (120, 48)
    assert np.bincount(data.train.labels).tolist() == [10] * 12
    assert np.bincount(data.test.labels).tolist() == [4] * 12
    assert data.task_sizes == (4, 4, 4)
    assert isinstance(data.train.images, np.ndarray)
    assert data.train.images.shape == (120, 32, 32, 3)
    assert data.train.images.dtype == np.uint8
    assert len(set(data.classes)) == 12
    assert not data.augmentation.flip
    assert data.augmentation.kind == "affine"


def test_same_seed_same_bytes_other_seed_other_bytes() -> None:
    first, again, other = SMALL.load(3), SMALL.load(3), SMALL.load(4)
    assert np.array_equal(first.train.images, again.train.images)
    assert np.array_equal(first.test.images, again.test.images)
    assert first.class_order == again.class_order
    assert not np.array_equal(first.train.images, other.train.images)
    assert first.class_order != other.class_order
    assert replace(SMALL, order_seed=3).load(4).class_order == first.class_order
    assert np.array_equal(replace(SMALL, image_seed=3).load(4).train.images, first.train.images)


def test_no_two_samples_of_a_class_are_equal_and_splits_do_not_share_any() -> None:
    data = SMALL.load(0)
    hashes = [hashlib.sha256(image.tobytes()).hexdigest() for image in [*data.train.images, *data.test.images]]
    assert len(set(hashes)) == len(hashes)


def test_samples_do_not_depend_on_how_many_are_asked_for() -> None:
    few = SMALL.load(0)
    many = replace(SMALL, classes=30, train_per_class=13).load(0)
    assert many.classes[:12] == few.classes
    for row, name in enumerate(few.train.names):
        assert np.array_equal(many.train.images[list(many.train.names).index(name)], few.train.images[row])
    assert np.array_equal(np.asarray(many.test.images)[: len(few.test)], few.test.images)


def test_train_and_test_use_different_faces() -> None:
    data = SMALL.load(0)
    faces = [{name.split("-", 1)[1] for name in part.names} for part in (data.train, data.test)]
    assert faces[0] == set(TRAIN_FACES)
    assert faces[1] == set(TEST_FACES)
    assert not faces[0] & faces[1]


def test_pretraining_never_sees_the_test_faces() -> None:
    seen = {face for point in glyph_classes("pretraining") for face in faces_of(point)}
    assert seen == {*TRAIN_FACES, *STIX_FACES, *CM_FACES}
    assert not seen & set(TEST_FACES)


def test_pretraining_and_benchmark_share_no_character_stem_or_look() -> None:
    benchmark, pretraining = glyph_classes("benchmark"), glyph_classes("pretraining")
    assert len(set(benchmark)) == len(benchmark) >= 500
    assert not set(benchmark) & set(pretraining)
    assert not {stem(point) for point in benchmark} & {stem(point) for point in pretraining}
    assert all(map(in_benchmark, benchmark))
    assert not any(map(in_benchmark, pretraining))
    assert stem(ord("É")) == stem(ord("e"))
    assert similarity(pretraining, benchmark).max() < ALIKE_ACROSS + 0.01
    assert similarity(pretraining, DIGITS).max() < LIKE_DIGIT + 0.01


def test_no_class_is_a_digit_and_every_face_has_every_benchmark_class() -> None:
    everything = {*glyph_classes("benchmark"), *glyph_classes("pretraining")}
    assert not [chr(point) for point in everything if chr(point).isnumeric()]
    for face in (*TRAIN_FACES, *TEST_FACES):
        assert set(glyph_classes("benchmark")) <= coverage(face)


def test_frozen_lists_are_what_the_rule_gives() -> None:
    # Not equality: the look-alike test reads rendered pixels, which a font renderer may change a little.
    for part, points in derive().items():
        frozen = set(glyph_classes(part))
        assert len(frozen & set(points)) / len(frozen | set(points)) > 0.97


def test_digits_themselves_and_look_alikes_are_dropped() -> None:
    everything = {*glyph_classes("benchmark"), *glyph_classes("pretraining")}
    assert sum(ord(letter) in everything for letter in "AΑА") == 1  # Latin, Greek, Cyrillic
    assert not everything & {ord(letter) for letter in "OoО0lI"}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"classes": 100_000}, "only"),
        ({"classes": 0}, "at least 1"),
        ({"train_per_class": 0}, "train_per_class"),
        ({"size": 4}, "8 pixels"),
        ({"clases": 5}, "did you mean 'classes'"),
    ],
)
def test_bad_options_say_what_is_wrong(options: dict[str, int], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        build(Glyphs, options, "benchmark")


def test_too_many_classes_says_how_many_there_are() -> None:
    with pytest.raises(ConfigError, match=str(len(glyph_classes("benchmark")))):
        Glyphs(classes=5000)


def test_more_tasks_than_classes_and_negative_seed_are_refused() -> None:
    with pytest.raises(ConfigError, match="tasks"):
        Glyphs(classes=3, tasks=4).load(0)
    with pytest.raises(ConfigError, match="negative"):
        SMALL.load(-1)


@pytest.mark.parametrize("size", [16, 32, 48])
def test_still_style_draws_the_glyph_upright_and_centred(size: int) -> None:
    image = render(ord("T"), "DejaVuSans", np.random.default_rng(0), size, STILL)
    assert image.shape == (size, size, 3)
    ink = image[..., 0] > 127
    rows, columns = np.flatnonzero(ink.any(1)), np.flatnonzero(ink.any(0))
    assert abs((rows[0] + rows[-1] + 1) / 2 - size / 2) <= 1
    assert abs((columns[0] + columns[-1] + 1) / 2 - size / 2) <= 1
    assert ink[rows[0]].sum() > 2 * ink[rows[-1]].sum()  # the bar of the T is on top


def test_thickness_and_ink_follow_the_style() -> None:
    def ink(style: Style) -> float:
        return float((render(ord("H"), "DejaVuSans", np.random.default_rng(0), 32, style) > 127).mean())

    assert ink(replace(STILL, thickness=(-0.9, -0.9))) < ink(STILL) < ink(replace(STILL, thickness=(0.9, 0.9)))
    assert ink(replace(STILL, dark_ink=1)) == pytest.approx(1 - ink(STILL), abs=0.02)


def test_a_code_point_without_ink_has_an_empty_mask() -> None:
    assert not any(glyph_mask(ord(" "), "DejaVuSans"))
