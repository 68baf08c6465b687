"""Texts of a few classes that share no word, and a tiny BERT of random weights that tells them apart."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
import torch

from cl_adapters import FrozenBackbone

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
    transformers = pytest.importorskip("transformers")
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
