"""Fixtures for every test: one thread, small random backbones, the reference assets where there are any."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: two workers on two cores, and figures that repeat
for name in ("COLUMNS", "LINES"):  # pytest-xdist sets them in its workers: tables would wrap there and not elsewhere
    os.environ.pop(name, None)

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Strategies without a ``seed`` take that of torch, which is another in every process unless it is set."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def repo_root() -> Path:
    return ROOT


@pytest.fixture(scope="session")
def assets() -> Path:
    """Folder of the reference weights and photographs; a test that asks for it is skipped where there is none."""
    named = os.environ.get("CL_ADAPTERS_ASSETS")
    folder = Path(named) if named else ROOT.parent / "shared" / "assets"
    if not folder.is_dir():
        pytest.skip(f"needs the reference assets: no folder {folder}; set CL_ADAPTERS_ASSETS to it")
    return folder


@pytest.fixture(scope="session")
def tiny_vit() -> Callable[..., torch.nn.Module]:
    """Factory of tiny timm VisionTransformers with random weights: ``tiny_vit(seed=0, width=32, depth=3, ...)``.

    Every weight is drawn from the seed (norms and biases too, so that no term vanishes by chance), none from the
    global generator. Input float32 [B, 3, img_size, img_size]; features float32 [B, width].
    """

    def build(
        seed: int = 0, *, width: int = 32, depth: int = 3, heads: int = 4, img_size: int = 32, patch_size: int = 8
    ) -> torch.nn.Module:
        from timm.models.vision_transformer import VisionTransformer

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # the constructor draws too, and not all of it is overwritten below
            model: torch.nn.Module = VisionTransformer(
                img_size=img_size,
                patch_size=patch_size,
                embed_dim=width,
                depth=depth,
                num_heads=heads,
                num_classes=0,
            )
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                noise = torch.randn(parameter.shape, generator=generator)
                if parameter.ndim > 1:
                    parameter.copy_(noise * (parameter[0].numel() ** -0.5))
                else:
                    parameter.add_(0.1 * noise)
        return model.eval()

    return build


DECODER_WORDS = (
    "the a is was of what text label answer : film good bad dull great colour sky grass fire night red green blue "
    "black number one two three four count first next after before yes no price high low cheap dear"
)


@pytest.fixture(scope="session")
def tiny_decoder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folder of a tiny causal language model of random weights with a tokenizer of words: ``tiny_decoder("llama")``.

    Kinds: "llama", "gpt2". Hidden 32, 2 layers, 64 positions; the words are ``DECODER_WORDS``; weights drawn wide, so
    that another adapter or another token is seen in every answer.
    """
    made: dict[str, Path] = {}

    def build(kind: str) -> Path:
        if kind not in made:
            made[kind] = _save_decoder(kind, tmp_path_factory.mktemp(kind))
        return made[kind]

    return build


def _save_decoder(kind: str, folder: Path) -> Path:
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    vocabulary = {word: place for place, word in enumerate(["<pad>", "<unk>", "<s>", "</s>", *DECODER_WORDS.split()])}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    if kind == "llama":  # its texts begin with a token of their own
        words.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 2)])
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)
    shared = {"vocab_size": len(vocabulary), "bos_token_id": 2, "eos_token_id": 3, "initializer_range": 0.2}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if kind == "llama":
            config = transformers.LlamaConfig(
                hidden_size=32,
                intermediate_size=48,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                max_position_embeddings=64,
                pad_token_id=0,
                **shared,
            )
            model = transformers.LlamaForCausalLM(config)
        else:
            config = transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=64, **shared)
            model = transformers.GPT2LMHeadModel(config)
    model.save_pretrained(folder)
    return folder
