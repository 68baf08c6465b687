"""Streams of texts: tokens computed once, one width, batches by length."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from cl_adapters import AdapterModel, FrozenBackbone
from cl_adapters.backbones.text import TextPreprocessing
from cl_adapters.benchmarks import load_benchmark
from cl_adapters.benchmarks.base import TextSet
from cl_adapters.benchmarks.data.text import Text
from cl_adapters.benchmarks.streams.datasets import TextDataset, as_dataset
from cl_adapters.benchmarks.streams.prepared import prepare
from cl_adapters.benchmarks.streams.tokenised import TokenSet
from cl_adapters.errors import ConfigError, DataError
from cl_adapters.strategies._loop.activation_cache import ActivationCache
from cl_adapters.strategies._loop.order import length_batches, reading_loader


def prepared_data(table: Path, backbone: FrozenBackbone, tasks: int = 3) -> Any:
    return prepare(Text(file=str(table), tasks=tasks).load(0), backbone).data


# --- tokens ----------------------------------------------------------------------------------------------------------


def test_each_text_is_tokenised_once_and_items_have_one_width(
    table: Path, backbone: FrozenBackbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    encode = TextPreprocessing.encode

    def counted(self: TextPreprocessing, texts: Sequence[str], length: int | None = None) -> Tensor:
        asked.extend(texts)
        return encode(self, texts, length)

    monkeypatch.setattr(TextPreprocessing, "encode", counted)
    benchmark = load_benchmark(f"text:{table}", backbone, options={"tasks": 3})
    for _ in range(2):
        for experience in (*benchmark.train_stream, *benchmark.test_stream):
            for dataset in (experience.dataset.train(), experience.dataset.eval()):
                batches = list(DataLoader(dataset, batch_size=5, num_workers=int(experience.current_experience == 0)))
                assert {x.shape[1] for x, *_ in batches} == {11}, "9 words and two special tokens"
                assert all(x.dtype == torch.int64 for x, *_ in batches)
    data = Text(file=str(table), tasks=3).load(0)
    assert len(asked) == len(data.train) + len(data.test)


def test_items_are_the_tokens_of_their_texts_in_training_and_evaluation(table: Path, backbone: FrozenBackbone) -> None:
    preprocessing: Any = backbone.preprocessing
    data = Text(file=str(table), tasks=3).load(0)
    assert isinstance(data.test, TextSet)
    label_of = dict(zip(data.test.texts, data.test.labels.tolist(), strict=True))
    stream = load_benchmark(f"text:{table}", backbone, options={"tasks": 3}).test_stream
    for experience in stream:
        for dataset in (experience.dataset.train(), experience.dataset.eval()):
            for (tokens, label, task), length in zip(dataset, dataset.lengths, strict=True):
                words = [text for text, own in label_of.items() if own == label]
                rows = [preprocessing.encode([text])[0].tolist() for text in words]
                assert tokens[tokens >= 0].tolist() in rows
                assert (int((tokens >= 0).sum()), task) == (length, 0)


def test_tokens_lie_on_disk_as_long_as_the_set(
    table: Path, backbone: FrozenBackbone, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    data = prepared_data(table, backbone)
    assert isinstance(data.train, TokenSet)
    assert isinstance(data.train.tokens, np.memmap)
    assert len(list(tmp_path.glob("*/tokens"))) == 2
    dataset = as_dataset(data.train)
    assert isinstance(dataset, TextDataset)
    first = dataset[0][0].clone()
    del data
    gc.collect()
    assert len(list(tmp_path.glob("*/tokens"))) == 1, "the data set still needs its texts"
    assert torch.equal(dataset[0][0], first)
    del dataset
    gc.collect()
    assert not list(tmp_path.iterdir())


def test_images_and_texts_need_backbones_of_their_kind(table: Path, backbone: FrozenBackbone) -> None:
    with pytest.raises(ConfigError, match=r"'digits' has images, but backbone .* takes texts.*timm:MODEL"):
        load_benchmark("digits", backbone)
    with pytest.raises(ConfigError, match=r"'text' has texts, but backbone 'vit_glyph_tiny' takes images.*hf:"):
        load_benchmark(f"text:{table}", FrozenBackbone.load("vit_glyph_tiny"))
    with pytest.raises(DataError, match="have no tokens yet"):
        as_dataset(Text(file=str(table)).load(0).train)


# --- order -----------------------------------------------------------------------------------------------------------


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def padding(lengths: Tensor, batches: list[Tensor]) -> int:
    return sum(int((lengths[rows].max() - lengths[rows]).sum()) for rows in batches)


def test_length_batches_hold_every_sample_once_and_little_padding() -> None:
    lengths = torch.randint(3, 60, (1003,), generator=seeded(1))
    batches = length_batches(lengths, 16, seeded())
    assert torch.equal(torch.cat(batches).sort().values, torch.arange(1003))
    assert sorted(map(len, batches))[:2] == [11, 16]
    assert [rows.tolist() for rows in batches] == [rows.tolist() for rows in length_batches(lengths, 16, seeded())]
    assert [rows.tolist() for rows in batches] != [rows.tolist() for rows in length_batches(lengths, 16, seeded(1))]
    plain = list(torch.randperm(1003, generator=seeded()).split(16))
    assert padding(lengths, batches) < padding(lengths, plain) / 5
    longest = torch.tensor([float(lengths[rows].max()) for rows in batches[:32]])
    assert not torch.equal(longest, longest.sort().values), "short and long batches alternate"


def test_dropping_the_last_batch_does_not_drop_the_longest() -> None:
    lengths = torch.arange(10)
    batches = length_batches(lengths, 4, seeded(), drop_last=True)
    assert [len(rows) for rows in batches] == [4, 4]
    left_out = set(range(10)) - set(torch.cat(batches).tolist())
    assert left_out == set(torch.randperm(10, generator=seeded())[8:].tolist())
    assert len(length_batches(lengths[:3], 4, seeded(), drop_last=True)) == 1


def test_reading_goes_from_long_to_short_and_back(table: Path, backbone: FrozenBackbone) -> None:
    dataset = as_dataset(prepared_data(table, backbone).train)
    assert isinstance(dataset, TextDataset)
    loader, back = reading_loader(dataset, 7)
    read = [(x, y) for x, y in loader]
    lengths = torch.cat([(x >= 0).sum(1) for x, _ in read])
    assert torch.equal(lengths, lengths.sort(descending=True).values)
    assert torch.cat([y for _, y in read])[back].tolist() == dataset.targets
    assert torch.equal(
        torch.cat([x for x, _ in read])[back], torch.stack([dataset[place][0] for place in range(len(dataset))])
    )


def test_texts_have_one_view(table: Path, backbone: FrozenBackbone) -> None:
    dataset = as_dataset(prepared_data(table, backbone).train)
    views = ActivationCache(AdapterModel(backbone), dataset, seeds=[0, 1, 2], batch=7, memory_mb=1)
    assert views.views == 1, "they are not augmented, so all would be the same"
    rows = torch.cat(list(views.batches(7, seeded())))
    assert torch.equal(rows.sort().values, torch.arange(len(dataset)))
