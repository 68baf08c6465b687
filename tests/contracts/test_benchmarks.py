"""What every registered benchmark keeps, whoever wrote it."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cl_adapters.benchmarks.base import BenchmarkConfig, BenchmarkData, SampleSet, TextSet, benchmarks
from cl_adapters.benchmarks.data import cifar100
from cl_adapters.benchmarks.spec import parse_benchmark
from cl_adapters.config import build, to_plain
from cl_adapters.errors import ConfigError

TASKS = 2
SMALL: dict[str, dict[str, Any]] = {"glyphs": {"classes": 4, "train_per_class": 3, "test_per_class": 2}}
"""Options that make a slow benchmark quick. A benchmark that is not named here runs with its defaults."""


FOLDERS = {"clinc150": "text/clinc150", "banking77": "text/banking77"}
"""Benchmarks that read the files of their authors: where those lie below the reference assets."""


def configure(name: str, tmp_path: Path, assets: Path | None) -> BenchmarkConfig:
    """Return a small configuration of the benchmark, or skip with the reason why it cannot run here."""
    values = {"tasks": TASKS, **SMALL.get(name, {})}
    if name == "folder":
        values["path"] = str(write_folder(tmp_path / "images"))
    if name == "text":
        values["file"] = str(write_table(tmp_path / "intents.csv"))
    if name in FOLDERS:
        if assets is None or not (assets / FOLDERS[name]).is_dir():
            pytest.skip(f"the reference assets hold no {FOLDERS[name]}")
        values["folder"] = str(assets / FOLDERS[name])
    if name == "cifar100" and not (Path(cifar100.CIFAR100().root).expanduser() / cifar100.ARCHIVE).is_file():
        pytest.skip(f"{cifar100.ARCHIVE} is not in {cifar100.CIFAR100().root}, and tests download nothing")
    cls = benchmarks.get(name)
    if cls.argument is not None and cls.argument not in values:
        pytest.skip(f"benchmark {name!r} needs its {cls.argument}, which this test cannot make up")
    return build(cls, values)


def write_folder(root: Path) -> Path:
    rng = np.random.default_rng(0)
    for name in ("ant", "bee", "cat"):
        (root / name).mkdir(parents=True)
        for position in range(5):
            Image.fromarray(rng.integers(0, 256, (6, 5, 3), dtype=np.uint8)).save(root / name / f"{position}.png")
    return root


def write_table(path: Path) -> Path:
    rows = [f"{name} number {position},{name}" for name in ("card payment", "late_card", "x") for position in range(5)]
    path.write_text("\n".join(["text,label", *rows]), encoding="utf-8")
    return path


def samples(part: SampleSet) -> list[bytes]:
    """Every byte of every sample."""
    if isinstance(part, TextSet):
        return [text.encode() for text in part.texts]
    return [repr(image.shape).encode() + np.ascontiguousarray(image).tobytes() for image in part.images]


def digest(data: BenchmarkData) -> str:
    """Hash of every byte of the samples, and of all that describes them."""
    total = hashlib.sha256()
    for part in (data.train, data.test):
        for sample in samples(part):
            total.update(sample + b"\0")
        total.update(part.labels.tobytes() + repr(list(part.names)).encode())
    total.update(repr((data.name, data.classes, data.class_order, data.task_sizes, data.licence)).encode())
    return total.hexdigest()


@pytest.fixture(params=benchmarks.names())
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def config(name: str, tmp_path: Path, request: pytest.FixtureRequest) -> BenchmarkConfig:
    return configure(name, tmp_path, request.getfixturevalue("assets") if name in FOLDERS else None)


def test_configuration_is_a_frozen_keyword_only_dataclass_with_a_summary(name: str) -> None:
    cls: Any = benchmarks.get(name)
    assert issubclass(cls, BenchmarkConfig)
    assert vars(cls)["__dataclass_params__"].frozen
    assert all(field.kw_only for field in dataclasses.fields(cls))
    assert cls.__doc__
    assert cls.summary
    assert "\n" not in cls.summary
    names = {field.name for field in dataclasses.fields(cls)}
    assert cls.argument is None or cls.argument in names
    assert "tasks" in names, "the runner's --set benchmark.tasks works everywhere"


def test_unknown_option_gets_a_suggestion(name: str) -> None:
    argument = ":x" if benchmarks.get(name).argument else ""
    with pytest.raises(ConfigError, match=r"unknown option benchmark\.taskz; did you mean 'tasks'"):
        parse_benchmark(f"{name}{argument}", {"taskz": 1})


def test_configuration_survives_json(name: str, config: BenchmarkConfig) -> None:
    assert build(type(config), to_plain(config)) == config
    assert benchmarks.name_of(config) == name


def test_same_seed_gives_the_same_bytes(config: BenchmarkConfig) -> None:
    assert digest(config.load(3)) == digest(config.load(3))


def test_global_random_state_is_neither_read_nor_changed(config: BenchmarkConfig) -> None:
    np.random.seed(0)
    before = np.random.get_state()[1].copy()  # type: ignore[index]
    first = digest(config.load(3))
    assert (np.random.get_state()[1] == before).all()  # type: ignore[index]
    np.random.seed(1)
    assert digest(config.load(3)) == first


def test_specification_is_whole(name: str, config: BenchmarkConfig) -> None:
    data = config.load(0)
    assert data.name == name
    assert len(set(data.classes)) == len(data.classes), "every class has a name of its own"
    assert all(data.classes)
    assert len(data.licence) > 5
    assert "\n" not in data.licence
    assert len(data.task_sizes) == TASKS
    assert sorted(label for task in data.tasks for label in task) == list(range(len(data.classes)))


def test_samples_are_rgb_bytes_or_texts_with_labels_of_both_splits(config: BenchmarkConfig) -> None:
    data = config.load(0)
    for part in (data.train, data.test):
        assert part.labels.dtype == np.int64
        assert set(part.labels.tolist()) == set(range(len(data.classes)))
        assert len(part.names) in (0, len(part))
        if isinstance(part, TextSet):
            assert all(isinstance(text, str) and text.strip() for text in part.texts)
            continue
        for image in part.images:
            assert image.dtype == np.uint8
            assert image.ndim == 3
            assert image.shape[2] == 3
            assert min(image.shape[:2]) > 0


def test_no_test_sample_is_a_training_sample(config: BenchmarkConfig) -> None:
    data = config.load(0)
    train, test = ({hashlib.sha256(sample).digest() for sample in samples(part)} for part in (data.train, data.test))
    # CIFAR-100 and CLINC150 themselves are known to repeat a few across their official splits.
    assert len(train & test) <= len(test) // 100


def test_impossible_number_of_tasks(config: BenchmarkConfig) -> None:
    with pytest.raises(ConfigError, match="tasks must be between 1 and"):
        dataclasses.replace(config, tasks=10_000).load(0)  # type: ignore[type-var]
