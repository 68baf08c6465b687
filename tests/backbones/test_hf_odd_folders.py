"""Folders of transformers models as they are found: odd padding ids, tokens added later, damaged weights."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from cl_adapters.backbones.frozen import FrozenBackbone
from cl_adapters.backbones.hf_forward import is_causal
from cl_adapters.errors import BackboneUnavailable, ConfigError, DataError
from cl_adapters.language.model import LanguageModel
from tests.backbones.conftest import DECODERS, TEXTS, model_of

transformers = pytest.importorskip("transformers")

PROMPTS = ["the sky is", "grass", "the grass is not blue the grass is"]
CHOICES = ["blue", "red", "not blue"]


@pytest.fixture
def altered(tiny_decoder: Callable[[str], Path], tmp_path: Path) -> Callable[..., Path]:
    """A copy of the tiny decoder of a kind with other entries in its config.json, and other tokenizer files."""

    def build(kind: str, tokenizer: dict[str, Any] | None = None, **config: Any) -> Path:
        folder = tmp_path / f"{kind}-{len(list(tmp_path.iterdir()))}"
        shutil.copytree(tiny_decoder(kind), folder)
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | config))
        if tokenizer is not None:
            tool = transformers.AutoTokenizer.from_pretrained(folder)
            tool.add_special_tokens(tokenizer)
            tool.save_pretrained(folder)
        return folder

    return build


def answers(language: LanguageModel) -> Any:
    return (
        language.generate(PROMPTS, 4),
        language.generate(PROMPTS, 4, num_beams=2),
        language.choose(PROMPTS, CHOICES),
        language.log_likelihood(PROMPTS, CHOICES).tolist(),
    )


@pytest.mark.parametrize("pad", [-1, None])
def test_an_id_of_empty_places_that_the_model_has_no_row_for(
    pad: int | None, altered: Callable[..., Path], tiny_decoder: Callable[[str], Path]
) -> None:
    place = f"hf:{altered('llama', pad_token_id=pad)}"
    odd, plain = FrozenBackbone.load(place), FrozenBackbone.load(f"hf:{tiny_decoder('llama')}")
    tokens_BN = plain.preprocessing.encode(PROMPTS)  # type: ignore[union-attr]
    assert torch.equal(odd.features(tokens_BN), plain.features(tokens_BN))
    assert answers(LanguageModel.load(place)) == answers(LanguageModel.load(f"hf:{tiny_decoder('llama')}"))


def test_a_token_for_empty_places_that_was_added_to_the_tokenizer_only(
    altered: Callable[..., Path], tiny_decoder: Callable[[str], Path]
) -> None:
    folder = altered("gpt2", {"pad_token": "[ADDED]"})
    language = LanguageModel.load(f"hf:{folder}")
    assert language.tokens.preprocessing.tool.pad_token_id == language.lm.config.vocab_size  # type: ignore[union-attr]
    assert answers(language) == answers(LanguageModel.load(f"hf:{tiny_decoder('gpt2')}"))
    with pytest.raises(DataError, match=r"token id \d+ in 'the \[ADDED\]', but the model knows the ids 0\.\."):
        language.generate(["the [ADDED]"])


def test_an_end_token_that_the_model_does_not_know(altered: Callable[..., Path]) -> None:
    with pytest.raises(DataError, match="the tokenizer's special tokens, but the model knows the ids"):
        LanguageModel.load(f"hf:{altered('gpt2', {'eos_token': '[ADDED]'})}")


def test_damaged_weights_say_where(altered: Callable[..., Path]) -> None:
    damaged = altered("gpt2")
    (damaged / "model.safetensors").write_bytes(b"\xff" * 100)
    with pytest.raises(BackboneUnavailable, match=r"cannot load .*SafetensorError"):
        FrozenBackbone.load(f"hf:{damaged}")
    for config in ({"n_embd": 64}, {"pad_token_id": 10**6}):
        with pytest.raises(BackboneUnavailable, match=r"cannot load "):
            FrozenBackbone.load(f"hf:{altered('gpt2' if 'n_embd' in config else 'llama', **config)}")


@pytest.mark.parametrize(("length", "least"), [(1, 3), (2, 3)])
def test_no_room_beside_the_special_tokens(length: int, least: int, folder: Callable[..., Path]) -> None:
    """All texts would be the same, or longer than the limit."""
    with pytest.raises(ConfigError, match=f"adds 2 special tokens to each, so choose at least {least}"):
        FrozenBackbone.load(f"hf:{folder('BERT')}", max_length=length)
    backbone = FrozenBackbone.load(f"hf:{folder('BERT')}", max_length=least)
    assert backbone.preprocessing is not None
    assert backbone.preprocessing.encode(TEXTS).shape == (4, least)  # type: ignore[union-attr]


def test_a_decoder_is_known_though_rows_of_a_batch_are_rounded_differently() -> None:
    encoder: nn.Module = model_of(*DECODERS["GPT-2"])

    def uneven(module: nn.Module, args: Any, output: Any) -> None:
        rows = torch.arange(len(output.last_hidden_state))
        output.last_hidden_state *= 1 + 1e-6 * rows[:, None, None]

    encoder.register_forward_hook(uneven)
    assert is_causal(encoder)


def test_loading_a_language_model_draws_no_bars(
    tiny_decoder: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    LanguageModel.load(f"hf:{tiny_decoder('gpt2')}")
    assert "Loading" not in "".join(capsys.readouterr())
