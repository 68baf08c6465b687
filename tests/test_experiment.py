"""Presets, and settings from the command line on top of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from cl_adapters.benchmarks.augmentation import train_transform
from cl_adapters.benchmarks.base import Augmentation
from cl_adapters.benchmarks.experiment import CONFIGS, Experiment, data_fingerprint, resolve
from cl_adapters.errors import ConfigError, UnknownName
from cl_adapters.preprocessing import Preprocessing
from cl_adapters.strategies.mos import MOSConfig

PRESETS = sorted(CONFIGS.glob("*.yaml"))


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_every_preset_is_valid_and_says_how_to_run_it(path: Path) -> None:
    strategy, benchmark = path.stem.split("-")
    experiment = resolve(strategy, benchmark)
    assert (experiment.strategy, experiment.benchmark) == (strategy, benchmark)
    assert Experiment.from_plain(experiment.to_plain()) == experiment
    header = path.read_text(encoding="utf-8").partition("strategy:")[0]
    assert f"cl-adapters run --strategy {strategy} --benchmark {benchmark}" in header


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
