"""Streams of texts: tokens computed once, batches by length, every strategy, the runner and the command line."""

from __future__ import annotations

import csv
import gc
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from typer.testing import CliRunner

import cl_adapters.strategies.base as strategy_base
from cl_adapters import AdapterModel, FrozenBackbone
from cl_adapters.benchmarks import load_benchmark
from cl_adapters.benchmarks.base import TextSet
from cl_adapters.benchmarks.cli import app
from cl_adapters.benchmarks.data.text import Text
from cl_adapters.benchmarks.datasets import TextDataset, as_dataset
from cl_adapters.benchmarks.evaluation import evaluate
from cl_adapters.benchmarks.experiment import resolve
from cl_adapters.benchmarks.prepared import prepare
from cl_adapters.benchmarks.runner import resume, run
from cl_adapters.benchmarks.tokenised import TokenSet
from cl_adapters.errors import ClAdaptersError, ConfigError, DataError
from cl_adapters.strategies.order import length_batches, reading_loader
from cl_adapters.text_preprocessing import TextPreprocessing

transformers = pytest.importorskip("transformers")
CLASSES, PER_CLASS = 6, 12


def sentence(label: int, position: int) -> str:
    """1 to 9 words, all of them of the class."""
    rng = np.random.default_rng([label, position])
    return " ".join(f"w{label}x{word}" for word in rng.integers(0, 4, 1 + rng.integers(0, 9)))


@pytest.fixture(scope="session")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Texts of classes that share no word."""
    path = tmp_path_factory.mktemp("texts") / "intents.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label", "split"])
        for label in range(CLASSES):
            for i in range(PER_CLASS):
                writer.writerow([sentence(label, i), f"intent {label}", "test" if i % 3 == 0 else "train"])
    return path


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a BERT of two layers with random weights, and a tokenizer that knows the words of the table."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from tokenizers.processors import TemplateProcessing

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    words += [f"w{label}x{word}" for label in range(CLASSES) for word in range(4)]
    vocabulary = {word: place for place, word in enumerate(words)}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", vocabulary["[CLS]"]), ("[SEP]", vocabulary["[SEP]"])]
    )
    folder = tmp_path_factory.mktemp("bert")
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_max_length=16,
    ).save_pretrained(folder)
    config = transformers.BertConfig(
        vocab_size=len(words),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=16,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.BertModel(config)
        with torch.no_grad():  # the words of a class resemble one another, and the random layers change them little
            words_VD = model.embeddings.word_embeddings.weight
            words_VD[4:] = torch.randn(CLASSES, 1, 32).expand(-1, 4, -1).flatten(0, 1) + 0.3 * torch.randn(24, 32)
            for parameter in model.encoder.parameters():
                if parameter.ndim > 1:
                    parameter.normal_(0, 0.1)
    model.save_pretrained(folder, safe_serialization=True)
    return folder


@pytest.fixture
def backbone(tiny_bert: Path) -> FrozenBackbone:
    return FrozenBackbone.load(f"hf:{tiny_bert}")


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
    assert len(asked) == CLASSES * PER_CLASS


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


# --- strategies ------------------------------------------------------------------------------------------------------

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
    known = strategy_base.strategies.get(name)
    fields = set(known.Config.__dataclass_fields__)
    settings = {key: value for key, value in FAST[name].items() if key in fields} | options
    strategy = known(model=backbone, seed=0, train_mb_size=8, evaluator=None, **settings)
    for experience in load_benchmark(f"text:{table}", backbone, options={"tasks": 3}).train_stream:
        strategy.train(experience)
    model: AdapterModel = strategy.model
    return model


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
    (x, _), *_ = DataLoader(as_dataset(prepared_data(table, backbone).test), batch_size=CLASSES * PER_CLASS)
    expected = plain.predict(x)
    for views in (1, 3):
        cached = trained(name, backbone, table, blocks=(1,), cached_views=views)
        assert torch.allclose(cached.predict(x), expected, atol=1e-4), "texts are not augmented: all views are equal"


def test_training_reads_batches_of_similar_length(table: Path, backbone: FrozenBackbone) -> None:
    seen: list[Tensor] = []

    class Watched(strategy_base.strategies.get("sequential")):  # type: ignore[misc]
        def before_pass(self) -> None:
            seen.append((self.mb_x >= 0).sum(1))

    strategy = Watched(model=backbone, seed=0, train_mb_size=4, train_epochs=3, evaluator=None)
    strategy.train(load_benchmark(f"text:{table}", backbone, options={"tasks": 1}).train_stream[0])
    assert sum(map(len, seen)) == 3 * CLASSES * PER_CLASS * 2 // 3
    assert np.mean([int(lengths.max() - lengths.min()) for lengths in seen]) < 2


# --- runner and command line -----------------------------------------------------------------------------------------


class Interrupted(Exception):
    pass


class StopAt:
    """A listener that stops a run when a task begins."""

    def __init__(self, task: int) -> None:
        self.task = task

    def task_started(self, task: int, tasks: int, names: list[str]) -> None:
        if task == self.task:
            raise Interrupted

    def progress(self, phase: str, done: int, total: int) -> None: ...

    def task_finished(self, results: Any) -> None: ...


def files_of(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted((folder / "tasks").rglob("*"))
        if path.is_file() and path.name != "row.json"  # which has the times
    }


@pytest.fixture
def experiment(table: Path, tiny_bert: Path) -> Callable[..., Any]:
    def build(strategy: str = "mos") -> Any:
        settings = {"benchmark.tasks": 3} | FAST[strategy]
        return resolve(strategy, f"text:{table}", backbone=f"hf:{tiny_bert}", settings=settings)

    return build


def test_a_resumed_run_is_the_uninterrupted_one(experiment: Callable[..., Any], tmp_path: Path) -> None:
    whole = run(experiment(), tmp_path / "whole")
    with pytest.raises(Interrupted):
        run(experiment(), tmp_path / "parts", listener=StopAt(2))
    resumed = resume(tmp_path / "parts")
    assert resumed.a_curve == whole.a_curve
    assert files_of(tmp_path / "parts") == files_of(tmp_path / "whole")
    assert (tmp_path / "parts" / "report.html").is_file()


def test_resuming_with_other_texts_is_refused(experiment: Callable[..., Any], table: Path, tmp_path: Path) -> None:
    content = table.read_text()
    with pytest.raises(Interrupted):
        run(experiment("simple_cil"), tmp_path / "run", listener=StopAt(1))
    try:
        table.write_text(content.replace("w0x1", "w0x2", 1))
        with pytest.raises(ConfigError, match="its inputs changed: data_fingerprint"):
            resume(tmp_path / "run")
    finally:
        table.write_text(content)


def test_command_line(table: Path, tiny_bert: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    cli = CliRunner()
    arguments = ["run", "--strategy", "simple_cil", "--benchmark", f"text:{table}", "--backbone", f"hf:{tiny_bert}"]
    done = cli.invoke(app, [*arguments, "--set", "benchmark.tasks=2", "--out", str(out)], catch_exceptions=False)
    assert done.exit_code == 0
    lines = tmp_path / "texts.txt"
    lines.write_text("w5x0 w5x1\n\n")
    done = cli.invoke(app, ["predict", "--run", str(out), "--text", "w2x1 w2x2", "--text-file", str(lines), "--json"])
    assert done.exit_code == 0
    assert '"class": "intent 2"' in done.stdout
    assert '"text": "w5x0 w5x1"' in done.stdout
    assert done.stdout.count('"text"') == 2
    for wrong, message in (
        (["picture.png"], "takes texts, not images"),
        ([], "give image files, or texts"),
        (["picture.png", "--text", "a"], "not both"),
        (["--text-file", str(tmp_path / "none")], "cannot be read"),
    ):
        failed = cli.invoke(app, ["predict", "--run", str(out), *wrong])
        assert isinstance(failed.exception, ClAdaptersError)
        assert message in str(failed.exception)


def test_texts_for_a_model_of_images(table: Path, tiny_vit: Callable[..., Any]) -> None:
    model = AdapterModel(FrozenBackbone.load("vit_glyph_tiny"))
    with pytest.raises(ClAdaptersError, match="takes images, not texts"):
        model.predict_texts(["a"])
    with pytest.raises(ClAdaptersError, match="no tokenizer"):
        AdapterModel(FrozenBackbone.wrap(tiny_vit())).predict_texts(["a"])
