"""Presets, and settings from the command line on top of them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from PIL import Image

from cl_adapters.backbones.preprocessing import Preprocessing
from cl_adapters.benchmarks.base import Augmentation, arrival_order, benchmarks
from cl_adapters.benchmarks.run.experiment import Experiment, Preset, data_fingerprint, presets, resolve
from cl_adapters.benchmarks.streams.augmentation import train_transform
from cl_adapters.config import to_plain
from cl_adapters.errors import ConfigError, UnknownName
from cl_adapters.strategies.mos import MOSConfig

PRESETS = presets()
OWN = ("digits", "glyphs", "repeats")
"""Benchmarks of the package: nobody published numbers on them."""

SHARED: dict[str, dict[str, Any]] = {
    "mos": {
        "merge": "paper",
        "adapter_momentum": 0.1,
        "reg": 0.1,
        "temperature": 0.8,
        "head_lr_factor": 0.1,
        "momentum": 0.9,
        "ensemble": True,
        "max_steps": 4,
        "alignment": {"epochs": 30, "lr": 0.005, "momentum": 0.9, "samples_per_class": 0},
        "adapter": {"type": "bottleneck", "bottleneck": 16, "scale": 0.1, "dropout": 0.1},
    },
    "sema": {
        "train_mb_size": 32,
        "lr": 0.005,
        "head_lr_factor": 1.0,
        "momentum": 0.9,
        "weight_decay": 5e-4,
        "last_blocks": 3,
        "descriptor_dim": 128,
        "descriptor_epochs": 20,
        "descriptor_lr": 0.01,
        "buffer": 500,
        "scan_mb_size": 128,
        "scan": "batch",
        "min_batch_share": 0.0,
        "max_adapters": None,
        "adapter": {"type": "bottleneck", "bottleneck": 16, "scale": 1.0, "dropout": 0.0},
    },
    "lae": {
        "first_blocks": 5,
        "train_mb_size": 24,
        "head_lr_factor": 1.0,
        "momentum": 0.9,
        "weight_decay": 0.0,
        "decay": 0.9999,
        "drop_last": True,
        "adapter": {"type": "bottleneck", "bottleneck": 5, "place": "attn", "activation": "gelu", "learn_scale": True},
    },
}
"""What all released configurations of a strategy have in common."""

TAGS = {"mos": "augreg_in21k_ft_in1k", "sema": "augreg2_in21k_ft_in1k", "lae": "orig_in21k"}

MOS = ("tasks", "train_epochs", "lr", "train_mb_size", "weight_decay", "covariance", "shuffle", "published")
SEMA = ("tasks", "train_epochs", "threshold", "shuffle", "published")
LAE = ("tasks", "train_epochs", "frozen_epochs", "lr", "published")
GOLDEN: dict[str, dict[str, Any]] = {
    "mos-cifar100": dict(zip(MOS, (20, 20, 0.03, 48, 5e-4, "full", True, "93.10 89.12"), strict=True)),
    "mos-cub": dict(zip(MOS, (20, 10, 0.01, 32, 5e-4, "full", True, "92.88 89.31"), strict=True)),
    "mos-imagenet_r": dict(zip(MOS, (10, 10, 0.05, 16, 5e-3, "full", True, "83.20 78.50"), strict=True)),
    "mos-imagenet_a": dict(zip(MOS, (10, 10, 0.05, 32, 5e-3, "diagonal", True, "69.39 60.04"), strict=True)),
    "mos-objectnet": dict(zip(MOS, (10, 10, 0.05, 48, 5e-3, "full", True, "75.02 65.15"), strict=True)),
    "mos-omnibenchmark": dict(zip(MOS, (15, 10, 0.01, 16, 5e-4, "full", True, "85.71 79.10"), strict=True)),
    "mos-vtab": dict(zip(MOS, (5, 20, 0.03, 32, 5e-3, "full", False, "92.50 93.31"), strict=True)),
    "sema-cifar100": dict(zip(SEMA, (10, 5, 2.0, True, "91.37 86.98"), strict=True)),
    "sema-imagenet_r": dict(zip(SEMA, (10, 20, 2.0, True, "81.75 74.53"), strict=True)),
    "sema-imagenet_a": dict(zip(SEMA, (20, 20, 1.0, False, "64.53 53.32"), strict=True)),
    "sema-vtab": dict(zip(SEMA, (5, 20, 1.0, False, "91.26 89.64"), strict=True)),
    "lae-cifar100": dict(zip(LAE, (10, 5, 3, 0.03 * 24 / 256, "85.59 89.96"), strict=True)),
    "lae-imagenet_r": dict(zip(LAE, (10, 50, 30, 0.005 * 24 / 256, "72.66 78.91"), strict=True)),
    "lae-domainnet": dict(zip(LAE, (5, 50, 30, 0.005 * 24 / 256, ""), strict=True)),
}
"""The released configurations (MOS 8d5e07c, SEMA 5a45512, LAE 1680e49), with average and last accuracy as published."""


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with train/ and test/ of twenty classes."""
    root = tmp_path_factory.mktemp("pictures")
    for part in ("train", "test"):
        for label in range(20):
            (root / part / f"class{label:02d}").mkdir(parents=True)
            Image.new("RGB", (2, 2), (label, 0, 0)).save(root / part / f"class{label:02d}" / "0.png")
    return root


def resolved(preset: Preset, pictures: Path) -> Experiment:
    """The experiment of a preset, as the command in its header makes it."""
    if preset.name in benchmarks.names():
        return resolve(preset.strategy, preset.name)
    return resolve(preset.strategy, f"folder:{pictures}", preset=preset.name)


def header_of(preset: Preset) -> str:
    lines = preset.path.read_text(encoding="utf-8").splitlines()
    return " ".join(line.lstrip("# ") for line in lines if line.startswith("#"))


@pytest.mark.parametrize("preset", PRESETS, ids=lambda preset: preset.path.stem)
def test_every_preset_is_valid_and_says_how_to_run_it(preset: Preset, pictures: Path) -> None:
    experiment = resolved(preset, pictures)
    assert experiment.strategy == preset.strategy
    assert experiment.benchmark == (preset.name if preset.name in benchmarks.names() else "folder")
    assert Experiment.from_plain(experiment.to_plain()) == experiment
    data = f"folder:{preset.name.upper()} --preset {preset.name}"
    benchmark = preset.name if preset.name in benchmarks.names() else data
    header = header_of(preset)
    assert f"cl-adapters run --strategy {preset.strategy} --benchmark {benchmark} " in header
    title, _, rest = header.partition("Run it with")
    assert preset.summary == title.strip()
    assert rest


@pytest.mark.parametrize("preset", PRESETS, ids=lambda preset: preset.path.stem)
def test_every_preset_gives_the_published_number_and_its_source(preset: Preset) -> None:
    header = header_of(preset)
    number = re.search(r"\bPublished\b[^:]*: A\S* \d", header)
    assert bool(number) != ("No published number" in header)
    if preset.name in OWN:
        assert "the benchmark is this package's own" in header
    else:
        assert re.search(r"released code|authors' repository", header)
        assert "timm" in header


def test_timm_has_the_weights_of_every_preset(pictures: Path) -> None:
    names = {resolved(preset, pictures).backbone.name for preset in PRESETS} - {"vit_glyph_tiny"}
    assert {name.rpartition(".")[2] for name in names} >= set(TAGS.values())
    for name in names:
        model, tag = name.removeprefix("timm:").split(".")
        assert f"{model}.{tag}" in timm.list_pretrained(f"{model}.*")


@pytest.mark.parametrize("name", GOLDEN)
def test_settings_of_the_papers(name: str, pictures: Path) -> None:
    (preset,) = (preset for preset in PRESETS if preset.path.stem == name)
    experiment = resolved(preset, pictures)
    benchmark, strategy = to_plain(experiment.benchmark_config), to_plain(experiment.strategy_config)
    expected = SHARED[preset.strategy] | GOLDEN[name]
    for number in expected.pop("published").split():
        assert number in header_of(preset)
    assert benchmark["tasks"] == expected.pop("tasks")
    shuffle = expected.pop("shuffle", preset.name == "cifar100")
    assert (benchmark.get("shuffle", True), benchmark["order_seed"]) == (shuffle, 1993 if shuffle else None)
    if preset.strategy == "lae":  # left out it is three fifths of the epochs
        assert expected.pop("frozen_epochs") == experiment.strategy_config.frozen_in(1)  # type: ignore[attr-defined]
    assert strategy["adapter"].items() >= expected.pop("adapter").items()
    assert {key: strategy[key] for key in expected} == expected
    scale = 0.08 if preset.strategy == "lae" else 0.05
    assert benchmark["augmentation"].items() >= {"kind": "crop", "scale": [scale, 1.0], "flip": True}.items()
    assert experiment.backbone.name == f"timm:vit_base_patch16_224.{TAGS[preset.strategy]}"
    assert experiment.backbone.name.removeprefix("timm:") in header_of(preset)
    assert experiment.backbone.crop_pct == 224 / 256


def test_a_preset_for_a_folder(pictures: Path) -> None:
    natural = resolve("mos", f"folder:{pictures}", preset="vtab", seed=1, settings={"lr": 1.5})
    assert (natural.strategy_config.lr, natural.strategy_config.train_mb_size) == (1.5, 32)  # type: ignore[attr-defined]
    data = natural.benchmark_config.load(natural.seed)
    assert (data.class_order, data.task_sizes) == (tuple(range(20)), (4,) * 5)
    shuffled = resolve("mos", f"folder:{pictures}", preset="cub", seed=1)
    assert shuffled.benchmark_config.load(shuffled.seed).class_order == arrival_order(20, 1993)
    plain = resolve("mos", f"folder:{pictures}")
    assert plain.strategy_config == MOSConfig()
    assert plain.backbone.name == "vit_glyph_tiny"


def test_a_preset_may_serve_another_benchmark_than_its_own() -> None:
    experiment = resolve("mos", "glyphs", preset="digits")
    assert experiment.benchmark == "glyphs"
    assert experiment.strategy_config == resolve("mos", "digits").strategy_config
    assert experiment.strategy_config != resolve("mos", "glyphs").strategy_config


def test_an_unknown_preset_is_refused(pictures: Path) -> None:
    message = "unknown preset of mos 'imagenetr'; did you mean 'imagenet_r'? Known: .*cub, .*vtab$"
    with pytest.raises(UnknownName, match=message.replace("?", r"\?")):
        resolve("mos", f"folder:{pictures}", preset="imagenetr")
    with pytest.raises(UnknownName, match=r"unknown preset of simple_cil 'cub'\. Known: digits, glyphs"):
        resolve("simple_cil", "digits", preset="cub")
    with pytest.raises(UnknownName, match="unknown strategy 'mus'"):
        resolve("mus", "digits", preset="cub")


def test_unknown_sections_of_a_preset_are_refused(tmp_path: Path) -> None:
    (tmp_path / "mos-x.yaml").write_text("strategie: {}\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"unknown sections \['strategie'\]; known: strategy, benchmark, backbone"):
        Preset("mos", "x", tmp_path / "mos-x.yaml").read()


def test_the_users_settings_beat_the_preset() -> None:
    experiment = resolve(
        "mos",
        "digits",
        seed=3,
        settings={"lr": 0.5, "adapter.bottleneck": 2, "benchmark.tasks": 2, "alignment.epochs": 1},
    )
    config = experiment.strategy_config
    assert isinstance(config, MOSConfig)
    assert (config.lr, config.adapter.bottleneck, config.alignment.epochs) == (0.5, 2, 1)  # type: ignore[attr-defined]
    assert config.train_epochs == resolve("mos", "digits").strategy_config.train_epochs  # type: ignore[attr-defined]
    assert experiment.benchmark_config.tasks == 2  # type: ignore[attr-defined]
    assert experiment.seed == 3


def test_a_preset_backbones_settings_go_with_that_backbone_only() -> None:
    assert resolve("mos", "cifar100").backbone.name.startswith("timm:")
    assert resolve("mos", "cifar100", backbone="vit_glyph_tiny").backbone.name == "vit_glyph_tiny"


def test_bad_settings_are_named() -> None:
    with pytest.raises(ConfigError, match="did you mean 'momentum'"):
        resolve("mos", "digits", settings={"momentun": 1})
    with pytest.raises(UnknownName, match="did you mean 'simple_cil'"):
        resolve("simple_cli", "digits")
    with pytest.raises(ConfigError, match="adapter"):
        resolve("mos", "digits", settings={"adapter.dropout": 2})


def test_data_fingerprint_sees_one_pixel_and_the_order() -> None:
    config = resolve("simple_cil", "digits").benchmark_config
    data = config.load(0)
    assert data_fingerprint(data) == data_fingerprint(config.load(0))
    assert data_fingerprint(data) != data_fingerprint(config.load(1))
    changed = config.load(0)
    image = changed.train.images[5]
    image[0, 0, 0] ^= 1
    assert data_fingerprint(changed) != data_fingerprint(data)


@pytest.mark.parametrize("kind", ["crop", "affine", "none"])
def test_training_transform_gives_the_backbones_input_and_draws_from_torch_alone(kind: str) -> None:
    preprocessing = Preprocessing(input_size=(3, 24, 24), interpolation="bilinear", crop_pct=1.0)
    scale = (0.05, 1.0) if kind == "crop" else (0.9, 1.1)
    transform = train_transform(preprocessing, Augmentation(kind=kind, scale=scale, flip=kind == "crop"))
    image = resolve("simple_cil", "digits").benchmark_config.load(0).train.images[0]
    drawn = []
    for seed in (0, 0, 1):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            drawn.append(transform(image))
    assert drawn[0].shape == (3, 24, 24)
    assert drawn[0].dtype == torch.float32
    assert torch.equal(drawn[0], drawn[1])
    assert torch.equal(drawn[0], drawn[2]) == (kind == "none")
    assert -1.0 <= float(drawn[0].min()) <= float(drawn[0].max()) <= 1.0


def test_predictors_are_named_only_where_they_are_chosen() -> None:
    assert "predictor" not in resolve("mos", "digits").to_plain()
    chosen = resolve("mos", "digits", settings={"predictor.type": "soft_top_k", "predictor.k": 2})
    assert chosen.to_plain()["predictor"] == {"type": "soft_top_k", "k": 2, "temperature": 0.07}
    assert Experiment.from_plain(chosen.to_plain()) == chosen
    with pytest.raises(ConfigError, match="k must be at least 1"):
        resolve("mos", "digits", settings={"predictor.type": "soft_top_k", "predictor.k": 0})
