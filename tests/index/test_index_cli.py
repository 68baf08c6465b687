"""`cl-adapters index` on a real pool with the embedded backbone, and the pool's own rules for an index."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from typer.testing import CliRunner

from cl_adapters import AdapterIndex, AdapterPool, FrozenBackbone
from cl_adapters.backbones.encode import image_preprocessing
from cl_adapters.benchmarks.cli.root import app
from cl_adapters.errors import ClAdaptersError, ConfigError, DataError, StorageError
from cl_adapters.index.calibration import calibrate
from cl_adapters.pool import PoolClass

NAMES = ("plain", "stripes", "disc", "noise")


def picture(kind: int, seed: int) -> Image.Image:
    draw = np.random.default_rng(seed)
    y, x = np.mgrid[:32, :32]
    shapes = (0 * x, 255 * (x // 4 % 2), 255 * ((x - 16) ** 2 + (y - 16) ** 2 < 90), draw.integers(0, 256, (32, 32)))
    grey = np.clip(shapes[kind] + draw.normal(0, 12, (32, 32)), 0, 255).astype(np.uint8)
    return Image.fromarray(np.repeat(grey[..., None], 3, axis=-1))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pool of two records with two classes each, photos by class, and features of each class as .npy."""
    root = tmp_path_factory.mktemp("index-cli")
    backbone = FrozenBackbone.load("vit_glyph_tiny")
    transform = image_preprocessing(backbone).eval_transform()

    def features(kind: int, seeds: range) -> Tensor:
        with torch.no_grad():
            return backbone.features(torch.stack([transform(picture(kind, seed)) for seed in seeds]))

    pool = AdapterPool.create(root / "pool", backbone)
    for task in range(2):
        kinds = (2 * task, 2 * task + 1)
        knowledge = {
            "keys": torch.cat([features(kind, range(8)) for kind in kinds]),
            "key_class": torch.arange(2).repeat_interleave(8),
            "held_out": torch.cat([features(kind, range(20, 25)) for kind in kinds]),
            "held_out_class": torch.arange(2).repeat_interleave(5),
        }
        classes = [PoolClass(label=kind, name=NAMES[kind]) for kind in kinds]
        pool.add({}, None, classes, knowledge=knowledge, tags=["first"] if task == 0 else [])
    for kind, name in enumerate(NAMES):
        (root / "photos" / name).mkdir(parents=True)
        picture(kind, 50).save(root / "photos" / name / "0.png")
        np.save(root / f"{name}.npy", features(kind, range(60, 62)).numpy())
    (root / "photos" / "readme.txt").write_text("not an image")
    return root


def run(*words: str | Path) -> str:
    result = CliRunner().invoke(app, ["index", *map(str, words)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


def answers(*words: str | Path) -> list[Any]:
    found: list[Any] = json.loads(run("query", *words, "--json"))["answers"]
    return found


def test_build_query_stats(place: Path) -> None:
    built = json.loads(run("build", place / "pool", "--false-reject", "0.1", "--json"))
    assert (built["keys"], built["records"], built["classes"], built["backend"]) == (4, 2, 4, "flat")
    assert Path(built["folder"]) == place / "pool" / "index" / "default"
    stats = json.loads(run("stats", place / "pool", "--json"))
    assert stats == built and stats["threshold"] > 0
    for row in answers(place / "pool", place / "photos", "--k", "2"):
        assert row["hits"][0]["name"] == Path(row["input"]).parent.name and len(row["hits"]) == 2 and row["known"]
        assert row["hits"][0]["record"] == ("task-000" if row["hits"][0]["label"] < 2 else "task-001")
    for name in NAMES:
        first, second = answers(place / "pool", place / f"{name}.npy")
        assert first["hits"][0]["name"] == second["hits"][0]["name"] == name
        assert second["input"] == f"{place / name}.npy[1]"
    strict = run("query", place / "pool", place / "photos" / "disc" / "0.png", "--threshold", "1.5", "--k", "1")
    assert "none of these" in strict and "disc" in strict and "1 of 1" in strict
    (row,) = answers(place / "pool", place / "photos" / "disc" / "0.png", "--tag", "first")
    assert {hit["record"] for hit in row["hits"]} == {"task-000"}


def test_options_reach_the_index(place: Path) -> None:
    words = ("--keys", "features", "--per-class", "3", "--metric", "mahalanobis", "--tag", "first", "--seed", "4")
    run("build", place / "pool", *words, "--backend", "ivf", "--set", "probes=2", "--name", "other")
    index = AdapterIndex.open(place / "pool" / "index" / "other", AdapterPool.open(place / "pool"))
    assert len(index) == 6 and index.config.options == {"probes": 2} and index.config.rule.seed == 4
    table = run("stats", place / "pool", "--name", "other")
    assert "mahalanobis" in table and "ivf" in table and "not calibrated" in table


def test_calibrated_threshold_refuses_the_share_asked_for(place: Path) -> None:
    index = AdapterIndex.build(AdapterPool.open(place / "pool"))
    held = torch.cat([index.pool.knowledge(id)["held_out"] for id in index.records])
    best = index.search_features(held, 1).scores[:, 0]
    for share in (0.1, 0.5):
        threshold = calibrate(index, share)
        assert threshold == index.threshold
        assert int((best < threshold).sum()) == int(share * (len(held) + 1)) - 1
    with pytest.raises(DataError, match="at least 99 are needed"):
        calibrate(index, 0.01)
    with pytest.raises(ConfigError, match="between 0 and 1"):
        calibrate(index, 1.0)


def test_abstention_is_shown(place: Path) -> None:
    """Scores and threshold in JSON; what is known is decided among the adapters that are searched."""
    built = json.loads(run("build", place / "pool", "--false-accept", "0.1", "--name", "accept", "--json"))
    index = AdapterIndex.open(place / "pool" / "index" / "accept", AdapterPool.open(place / "pool"))
    assert built["threshold"] == index.threshold == calibrate(index, false_accept=0.1)
    words = ("query", place / "pool", place / "photos", "--name", "accept")
    found = json.loads(run(*words, "--json"))
    assert found["threshold"] == built["threshold"]
    assert [row["known"] for row in found["answers"]] == [True] * 4
    filtered = json.loads(run(*words, "--tag", "first", "--json"))["answers"]
    for row, whole in zip(filtered, found["answers"], strict=True):
        first = Path(row["input"]).parent.name in NAMES[:2]
        assert row["known"] == first == (row["hits"][0]["score"] >= built["threshold"])
        assert (row["hits"][0]["score"] == pytest.approx(whole["hits"][0]["score"])) == first
    table = run(*words, "--tag", "first", "--k", "1")
    assert table.count("none of these") == 3 and "2 of 4 are none of these" in table
    nothing = json.loads(run(*words, "--tag", "never-given", "--json"))["answers"]
    assert [(row["known"], row["hits"]) for row in nothing] == [(False, [])] * 4
    with pytest.raises(ConfigError, match="give one target"):
        run("build", place / "pool", "--false-accept", "0.1", "--false-reject", "0.1")


def test_errors_say_what_to_do(place: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.npy").write_bytes(b"\x93NUMPY\x01\x00rest")
    np.save(tmp_path / "objects.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    np.save(tmp_path / "flat.npy", np.zeros(5, np.float32))
    np.save(tmp_path / "narrow.npy", np.zeros((2, 5), np.float32))
    header = b"{'descr': '<f4', 'fortran_order': False, 'shape': (1000000000000, 128), }".ljust(117) + b"\n"
    (tmp_path / "huge.npy").write_bytes(b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header)
    (tmp_path / "empty").mkdir()
    run("build", place / "pool")
    photo = place / "photos" / "disc" / "0.png"
    for words, kind, message in (
        (("query", place / "pool", photo, "--name", "none"), StorageError, "index build"),
        (("query", place / "pool", photo, "--name", "../../x"), ConfigError, "not a path"),
        (("query", place / "pool", tmp_path / "bad.npy"), DataError, "bad.npy"),
        (("query", place / "pool", tmp_path / "objects.npy"), DataError, "objects.npy"),
        (("query", place / "pool", tmp_path / "huge.npy"), DataError, "huge.npy is no .npy file"),
        (("query", place / "pool", tmp_path / "flat.npy"), DataError, r"\[N, D\]"),
        (("query", place / "pool", tmp_path / "narrow.npy"), DataError, "width of the index"),
        (("query", place / "pool", tmp_path / "empty"), DataError, "no image files"),
        (("query", place / "pool", photo, tmp_path / "flat.npy"), ConfigError, "not both"),
        (("build", place / "pool", "--set", "probes"), ConfigError, "KEY=VALUE"),
        (("build", place / "pool", "--set", "probes=1", "--set", "probes=2"), ConfigError, "probes is given twice"),
        (("build", place / "pool", "--set", "probes=[1"), ConfigError, "no YAML value; quote it"),
        (("build", place / "pool", "--metric", "cos"), ConfigError, "cosine"),
    ):
        with pytest.raises(kind, match=message):
            run(*words)
    assert issubclass(kind, ClAdaptersError)


def test_more_neighbours_than_keys(place: Path) -> None:
    run("build", place / "pool")
    (found,) = answers(place / "pool", place / "photos" / "disc" / "0.png", "--k", str(10**15))
    assert {hit["name"] for hit in found["hits"]} == {*NAMES}


def test_an_empty_pool(place: Path, tmp_path: Path) -> None:
    AdapterPool.create(tmp_path / "pool", AdapterPool.open(place / "pool").backbone)
    assert "None" not in run("build", tmp_path / "pool")
    assert answers(tmp_path / "pool", place / "disc.npy")[0]["hits"] == []


def test_a_pool_that_changes(place: Path) -> None:
    pool = AdapterPool.open(place / "pool")
    index = AdapterIndex.build(pool)
    index.save()
    extra = pool.add(
        {},
        None,
        [PoolClass(label=9)],
        knowledge={
            "keys": torch.ones(2, pool.backbone_card.num_features),
            "key_class": torch.zeros(2, dtype=torch.long),
        },
    )
    try:
        assert index.changes().added == (extra.id,)
        with pytest.raises(StorageError, match=f"1 added .{extra.id}."):
            run("query", place / "pool", place / "disc.npy")
        found = answers(place / "pool", place / "disc.npy", "--stale", "refresh", "--k", "9")
        assert extra.id in {hit["record"] for hit in found[0]["hits"]}
        assert json.loads(run("stats", place / "pool", "--json"))["changes"]["added"] == [extra.id]
        assert pool.verify().ok
    finally:
        pool.remove(extra.id)
    assert not AdapterIndex.open(None, pool).changes()
