"""An experiment: one strategy on one benchmark with one backbone and one seed, fully resolved."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from cl_adapters.backbones.frozen import FrozenBackbone, Pooling
from cl_adapters.backbones.load import absolute_name
from cl_adapters.benchmarks.base import BenchmarkConfig, BenchmarkData, TextSet
from cl_adapters.benchmarks.spec import parse_benchmark
from cl_adapters.config import build, check_range, put_nested, to_plain
from cl_adapters.errors import ConfigError, UnknownName
from cl_adapters.parts.keys import KeysConfig
from cl_adapters.predictors.base import Predictor, predictor_from, predictor_to_plain
from cl_adapters.strategies.base import AdapterStrategy, strategies
from cl_adapters.strategies.config import StrategyConfig

CONFIGS = Path(__file__).parent.parent / "configs"
DEFAULT_BACKBONE = "vit_glyph_tiny"


@dataclasses.dataclass(frozen=True)
class Preset:
    """Settings of a strategy on a benchmark, or a data set that "folder" reads: ``configs/STRATEGY-NAME.yaml``."""

    strategy: str
    name: str
    path: Path

    @property
    def summary(self) -> str:
        """What it is: the header of the file up to the command that runs it, as one line."""
        lines = self.path.read_text(encoding="utf-8").splitlines()
        header = itertools.takewhile(lambda line: line.startswith("#"), lines)
        return " ".join(line.lstrip("# ") for line in header).partition(" Run it with")[0]

    def read(self) -> dict[str, Any]:
        """The settings as plain values.

        Raises:
            ConfigError: other sections than "strategy", "benchmark" and "backbone".
        """
        content = yaml.safe_load(self.path.read_text(encoding="utf-8")) or {}
        unknown = set(content) - {"strategy", "benchmark", "backbone"}
        if unknown:
            raise ConfigError(f"{self.path}: unknown sections {sorted(unknown)}; known: strategy, benchmark, backbone")
        return dict(content)


def presets() -> list[Preset]:
    """All presets, by strategy and name."""
    stems = ((path.stem.partition("-"), path) for path in sorted(CONFIGS.glob("*-*.yaml")))
    return [Preset(strategy, name, path) for (strategy, _, name), path in stems]


@dataclasses.dataclass(frozen=True, kw_only=True)
class BackboneConfig:
    """Which backbone: the arguments of :meth:`FrozenBackbone.load`."""

    name: str = DEFAULT_BACKBONE
    weights: str | None = None
    img_size: int | None = None
    crop_pct: float | None = None
    pooling: Pooling | None = None
    max_length: int | None = None
    dtype: str | None = None
    quantization: str | None = None

    def __post_init__(self) -> None:
        check_range(self, "[1, 65536]", "img_size")
        check_range(self, "(0, inf)", "crop_pct")
        check_range(self, "[1, inf)", "max_length")

    def load(self) -> FrozenBackbone:
        """Load it.

        Raises:
            ConfigError: the network cannot be built for images of that size.
        """
        try:
            return FrozenBackbone.load(**dataclasses.asdict(self))
        except (RuntimeError, AssertionError) as error:
            if self.img_size is None:
                raise
            reason = str(error).partition("\n")[0]
            raise ConfigError(f"img_size={self.img_size} does not suit {self.name}: {reason}") from error

    def to_plain(self) -> dict[str, Any]:
        """JSON-ready; options of transformers models only where they are set, as in files of earlier runs."""
        later = ("pooling", "max_length", "dtype", "quantization")
        return {key: value for key, value in to_plain(self).items() if key not in later or value is not None}


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Sections:
    """The plain values of an experiment, section by section."""

    strategy: dict[str, Any]
    benchmark: dict[str, Any]
    backbone: dict[str, Any] = dataclasses.field(default_factory=dict)
    seed: int = 0
    keys: dict[str, Any] | None = None
    predictor: dict[str, Any] | str | None = None

    def __post_init__(self) -> None:
        check_range(self, "[0, inf)", "seed")
        for section in ("strategy", "benchmark"):
            name = getattr(self, section).get("name")
            if not isinstance(name, str):
                raise ValueError(f"{section} needs the name of a {section}, got {name!r}")


@dataclasses.dataclass(frozen=True)
class Experiment:
    """Everything that decides a run's numbers.

    Attributes:
        strategy, benchmark: registered names; ``strategy_config`` and ``benchmark_config`` are their settings.
        keys: what is kept of each class to look inputs up by; None: nothing.
        predictor: how inputs are answered; None: the strategy's own.
    """

    strategy: str
    strategy_config: StrategyConfig
    benchmark: str
    benchmark_config: BenchmarkConfig
    backbone: BackboneConfig
    seed: int
    keys: KeysConfig | None = None
    predictor: Predictor | None = None

    @property
    def strategy_class(self) -> type[AdapterStrategy]:
        """The registered class."""
        return strategies.get(self.strategy)

    def to_plain(self) -> dict[str, Any]:
        """JSON-ready; :meth:`from_plain` gives it back."""
        later = {} if self.keys is None else {"keys": to_plain(self.keys)}
        if self.predictor is not None:
            later["predictor"] = predictor_to_plain(self.predictor)
        return {
            "strategy": {"name": self.strategy} | to_plain(self.strategy_config),
            "benchmark": {"name": self.benchmark} | to_plain(self.benchmark_config),
            "backbone": self.backbone.to_plain(),
            "seed": self.seed,
        } | later

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> Experiment:
        """Build from nested plain values: "strategy", "benchmark" (each with a "name"), "backbone", "seed" and more.

        Raises:
            UnknownName, ConfigError: with the nearest valid name.
        """
        sections = build(_Sections, plain, "experiment")
        strategy, benchmark = dict(sections.strategy), dict(sections.benchmark)
        name = strategy.pop("name")
        config = build(strategies.get(name).Config, strategy, name)
        benchmark_name, benchmark_config = parse_benchmark(benchmark.pop("name"), benchmark)
        backbone = build(BackboneConfig, sections.backbone, "backbone")
        keys = None if sections.keys is None else build(KeysConfig, sections.keys, "keys")
        predictor = None if sections.predictor is None else predictor_from(sections.predictor)
        return cls(name, config, benchmark_name, benchmark_config, backbone, sections.seed, keys, predictor)


def resolve(
    strategy: str,
    benchmark: str,
    *,
    preset: str | None = None,
    backbone: str | None = None,
    weights: str | None = None,
    seed: int = 0,
    settings: Mapping[str, Any] | None = None,
) -> Experiment:
    """An experiment from the command line: a preset, then the user's settings on top.

    Args:
        strategy: name.
        benchmark: "digits" or "folder:PATH".
        preset: name of one of the strategy's :func:`presets`; default that of the benchmark, if there is one.
        backbone: default that of the preset, else the embedded one.
        weights: local weights file.
        seed: of the run.
        settings: dotted keys to values. "benchmark.KEY", "backbone.KEY", "keys.KEY" and "predictor.KEY" go there;
            "img_size", "weights" and "crop_pct" are the backbone's; every other key is the strategy's ("lr",
            "adapter.bottleneck").

    Raises:
        UnknownName, ConfigError: with the nearest valid name.
    """
    strategies.get(strategy)
    known = {known.name: known for known in presets() if known.strategy == strategy}
    if preset is not None and preset not in known:
        raise UnknownName.of(f"preset of {strategy}", preset, known)
    name = preset or benchmark.partition(":")[0]
    plain = known[name].read() if name in known else {}
    chosen = {"name": backbone or plain.get("backbone", {}).get("name", DEFAULT_BACKBONE)}
    if backbone is None or backbone == plain.get("backbone", {}).get("name"):
        chosen = plain.get("backbone", {}) | chosen
    chosen["name"] = absolute_name(chosen["name"])  # so that the run goes on from any folder
    plain["backbone"] = chosen | ({} if weights is None else {"weights": str(Path(weights).resolve())})
    plain["strategy"] = plain.get("strategy", {}) | {"name": strategy}
    plain["benchmark"] = plain.get("benchmark", {}) | {"name": benchmark}
    plain["seed"] = seed
    backbone_keys = {field.name for field in dataclasses.fields(BackboneConfig)} - {"name"}
    for key, value in (settings or {}).items():
        path = key.split(".")
        if path[0] in ("benchmark", "backbone", "strategy", "keys", "predictor") and len(path) > 1:
            section, *path = path
        else:
            section = "backbone" if key in backbone_keys else "strategy"
        put_nested(plain.setdefault(section, {}), path, value, named=True)
    return Experiment.from_plain(plain)


def data_fingerprint(data: BenchmarkData) -> str:
    """SHA-256 over class order, task sizes, labels and every pixel or letter: the same data or not."""
    digest = hashlib.sha256(repr((data.classes, data.class_order, data.task_sizes)).encode())
    for part in (data.train, data.test):
        digest.update(part.labels.tobytes())
        if isinstance(part, TextSet):
            for text in part.texts:
                content = text.encode("utf-8", "surrogatepass")
                digest.update(len(content).to_bytes(8, "little") + content)
            continue
        for image in part.images:
            digest.update(repr(image.shape).encode())
            digest.update(image.tobytes())
    return digest.hexdigest()
