"""`cl-adapters index evaluate` on handwritten digits: its figures are those of answers one by one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from cl_adapters import AdapterIndex, AdapterModel, AdapterPool, FrozenBackbone
from cl_adapters.adapters.bottleneck import Bottleneck
from cl_adapters.backbones.encode import image_preprocessing
from cl_adapters.bank.bank import AdapterBank
from cl_adapters.benchmarks.cli.root import app
from cl_adapters.benchmarks.data.digits import Digits
from cl_adapters.benchmarks.streams.datasets import task_indices
from cl_adapters.errors import ConfigError, PoolError, UnknownName
from cl_adapters.index.calibration import calibrate
from cl_adapters.pool import PoolClass
from cl_adapters.predictors.nearest_key import NearestKey

LIMIT = 3
SMALL = Bottleneck(bottleneck=2)


@pytest.fixture(scope="module")
def digits() -> Any:
    return Digits().load(seed=0)


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory, digits: Any) -> AdapterPool:
    """Two adapters with two digits each, and a calibrated index."""
    backbone = FrozenBackbone.load("vit_glyph_tiny")
    transform = image_preprocessing(backbone).eval_transform()
    made = AdapterPool.create(tmp_path_factory.mktemp("evaluate") / "pool", backbone)
    bank, draw = AdapterBank(backbone, SMALL), torch.Generator().manual_seed(0)
    for labels in ((0, 1), (2, 3)):
        rows = [task_indices(digits.train, [label])[:20] for label in labels]
        images = [transform(digits.train.images[row]) for part in rows for row in part]
        with torch.no_grad():
            features = backbone.features(torch.stack(images))
        held = torch.arange(40) % 2 == 0
        of = torch.arange(2).repeat_interleave(20)
        knowledge = {"keys": features[~held], "key_class": of[~held], "held_out": features[held]}
        made.add(
            bank.fresh(draw),
            SMALL,
            [PoolClass(label=label, name=digits.classes[label]) for label in labels],
            knowledge=knowledge | {"held_out_class": of[held]},
            benchmark="digits",
        )
    index = AdapterIndex.build(made, keys="features")
    calibrate(index, 0.2)
    index.save()
    return made


def evaluate(pool: AdapterPool, *words: str) -> Any:
    done = CliRunner().invoke(app, ["index", "evaluate", str(pool.path), "--limit", str(LIMIT), *words])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code == 0, done.output
    return json.loads(done.output) if "--json" in words else done.output


def test_figures(pool: AdapterPool, digits: Any) -> None:
    found = evaluate(pool, "--json")
    index = AdapterIndex.open(None, pool)
    model = AdapterModel.from_pool(pool, index=index)
    assert isinstance(model.predictor, NearestKey)
    transform = image_preprocessing(pool.backbone).eval_transform()
    right, routed, kept, scores = [], [], [], []
    for label in range(10):
        for row in task_indices(digits.test, [label])[:LIMIT]:
            image = transform(digits.test.images[row])[None]
            answer = model.answer(image)
            right.append(model.classes[int(answer.logits.argmax())] == label)
            routed.append(int(answer.adapter) == label // 2)
            assert answer.abstained is not None
            kept.append(not bool(answer.abstained))
            scores.append(index.query(image, 1)[0][0].score)
    known = 4 * LIMIT
    above = np.subtract.outer(scores[:known], scores[known:])
    assert (found["known"], found["unseen"], found["predictor"]) == (known, 6 * LIMIT, "nearest_key")
    assert found["threshold"] == index.threshold
    assert found["accuracy"] == pytest.approx(np.mean(right[:known]))
    assert found["routing"] == pytest.approx(np.mean(routed[:known]))
    assert found["coverage"] == pytest.approx(np.mean(kept[:known]))
    assert found["false_accept"] == pytest.approx(np.mean(kept[known:]))
    assert found["auroc"] == pytest.approx((above > 0).mean())
    assert found["auroc"] > 0.7
    text = evaluate(pool)
    assert f"{100 * found['routing']:.2f} %" in text
    assert f"{found['auroc']:.4f}" in text
    assert "12 test samples of 4 known classes of digits, 18 of classes never seen; predictor nearest_key" in text


def test_other_unseen_classes_and_predictors(pool: AdapterPool, digits: Any) -> None:
    more = evaluate(pool, "--unseen", "glyphs", "--predictor", "knn_vote", "--set", "k=3", "--json")
    assert more["unseen"] > 100
    assert more["predictor"] == "knn_vote"
    for words, kind, message in (
        (("--unseen", "digits"), ConfigError, "its others are asked anyway"),
        (("--predictor", "knn_vot"), UnknownName, "did you mean 'knn_vote'"),
        (("--set", "k=3"), ConfigError, "of --predictor NAME"),
        (("--benchmark", "glyphs"), ConfigError, "but .* in benchmark 'glyphs'"),
    ):
        with pytest.raises(kind, match=message):
            evaluate(pool, *words)


def test_an_index_of_nothing(pool: AdapterPool, tmp_path: Path) -> None:
    empty = AdapterPool.create(tmp_path / "pool", pool.backbone)
    AdapterIndex.build(empty).save()
    with pytest.raises(PoolError, match="has no adapter with classes"):
        evaluate(empty)
