"""Class-incremental learning of texts: every strategy trains, saves, loads and answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

import cl_adapters.strategies.base as strategy_base
from cl_adapters import AdapterModel, FrozenBackbone
from cl_adapters.benchmarks import load_benchmark
from cl_adapters.benchmarks.data.text import Text
from cl_adapters.benchmarks.run.evaluation import evaluate
from cl_adapters.benchmarks.streams.datasets import as_dataset
from cl_adapters.benchmarks.streams.prepared import prepare
from cl_adapters.errors import ConfigError
from cl_adapters.features import FeatureMemory


def prepared_data(table: Path, backbone: FrozenBackbone, tasks: int = 3) -> Any:
    return prepare(Text(file=str(table), tasks=tasks).load(0), backbone).data


FAST: dict[str, dict[str, Any]] = {
    "simple_cil": {},
    "sequential": {"train_epochs": 4, "lr": 0.05},
    "joint": {"train_epochs": 4, "lr": 0.05},
    "lae": {"train_epochs": 4, "lr": 0.05},
    "sema": {"train_epochs": 8, "lr": 0.05, "descriptor_epochs": 2},
    "mos": {"train_epochs": 2, "alignment": {"epochs": 2}},
    "ranpac": {"projection": 64, "train_epochs": 2},
}


def trained(name: str, backbone: FrozenBackbone, table: Path, **options: Any) -> AdapterModel:
    """The model after three tasks of two classes."""
    settings = FAST[name] | options
    strategy = strategy_base.strategies.get(name)(model=backbone, seed=0, train_mb_size=8, evaluator=None, **settings)
    for experience in load_benchmark(f"text:{table}", backbone, options={"tasks": 3}).train_stream:
        strategy.train(experience)
    model: AdapterModel = strategy.model
    return model


def test_evaluation_wants_a_batch_of_one_or_more(backbone: FrozenBackbone, table: Path) -> None:
    for batch in (-1, 0, 2.5):
        with pytest.raises(ConfigError, match=rf"batch_size has to be a whole number, at least 1; got {batch}"):
            evaluate(AdapterModel(backbone), prepared_data(table, backbone), [0], batch_size=batch)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", list(FAST))
def test_every_strategy_learns_texts_and_its_saved_model_answers(
    name: str, backbone: FrozenBackbone, table: Path, tmp_path: Path
) -> None:
    model = trained(name, backbone, table)
    data = prepared_data(table, backbone)
    found = evaluate(model, data, [0, 1, 2])
    if name not in ("sequential", "lae", "sema"):  # which forget, being what they are
        assert min(found.accuracy) > 80
    assert found.accuracy[-1] > 80
    texts = list(data.test.texts)
    answers = model.predict_texts(texts, batch=5)
    assert [answer.input for answer in answers] == texts
    right = [answer.label == label for answer, label in zip(answers, data.test.labels, strict=True)]
    assert 100 * np.mean(right) == pytest.approx(np.mean(found.accuracy)), "whatever the batches"
    loaded = AdapterModel.load(model.save(tmp_path / "model"))
    again = loaded.predict_texts(texts[::-1], batch=64)[::-1]
    assert [answer.label for answer in again] == [answer.label for answer in answers]
    assert [answer.score for answer in again] == pytest.approx([answer.score for answer in answers], abs=1e-5)


@pytest.mark.parametrize("name", ["sequential", "mos", "sema"])
def test_cached_views_of_texts_give_the_numbers_without(name: str, backbone: FrozenBackbone, table: Path) -> None:
    plain = trained(name, backbone, table, blocks=(1,))
    (x, _), *_ = DataLoader(as_dataset(prepared_data(table, backbone).test), batch_size=1000)
    expected = plain.predict(x)
    for views in (1, 3):
        cached = trained(name, backbone, table, blocks=(1,), cached_views=views)
        assert torch.allclose(cached.predict(x), expected, atol=1e-4), "texts are not augmented: all views are equal"


def test_remembered_features_belong_to_their_texts(backbone: FrozenBackbone, table: Path) -> None:
    model = trained("mos", backbone, table)
    data = prepared_data(table, backbone)
    memory = FeatureMemory(model)
    evaluate(model, data, [1], batch_size=3, memory=memory)
    found = evaluate(model, data, [0, 1, 2], batch_size=5, memory=memory)
    expected = evaluate(model, data, [0, 1, 2], batch_size=64)
    assert (found.accuracy, found.routing) == (expected.accuracy, expected.routing)
    assert found.computed < expected.computed


def test_training_reads_batches_of_similar_length(table: Path, backbone: FrozenBackbone) -> None:
    seen: list[Tensor] = []

    class Watched(strategy_base.strategies.get("sequential")):  # type: ignore[misc]
        def before_pass(self) -> None:
            seen.append((self.mb_x >= 0).sum(1))

    strategy = Watched(model=backbone, seed=0, train_mb_size=4, train_epochs=3, evaluator=None)
    experience = load_benchmark(f"text:{table}", backbone, options={"tasks": 1}).train_stream[0]
    strategy.train(experience)
    assert sum(map(len, seen)) == 3 * len(experience.dataset)
    assert np.mean([int(lengths.max() - lengths.min()) for lengths in seen]) < 2
