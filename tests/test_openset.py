"""Thresholds keep the rates that they promise, are saved with the model, and say what was refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cl_adapters.backbones.frozen import FrozenBackbone
from cl_adapters.errors import ConfigError, DataError
from cl_adapters.model.facade import AdapterModel
from cl_adapters.openset import calibrate, lower_threshold, open_set, unknown_scores, upper_threshold
from cl_adapters.parts.abstention import Abstention
from cl_adapters.parts.keys import Keys
from cl_adapters.predictors.nearest_key import NearestKey
from tests.models import random_model

WIDTH = 16
Make = Callable[..., AdapterModel]


def patterns(labels: list[int], n: int, seed: int) -> tuple[Tensor, Tensor]:
    """Noisy images [B, 3, 16, 16] of a fixed pattern per class, and labels."""
    draw = torch.Generator().manual_seed(seed)
    plain = torch.randn(12, 3, 16, 16, generator=torch.Generator().manual_seed(99))
    y = torch.tensor(labels).repeat_interleave(n)
    return plain[y] + 0.5 * torch.randn(len(y), 3, 16, 16, generator=draw), y


@pytest.fixture
def make_model(tiny_vit: Callable[..., nn.Module]) -> Make:
    """Factory of models with three tasks of two classes, keys from 40 images per class, half of them held back."""

    def make(held_out: float = 0.5) -> AdapterModel:
        backbone = FrozenBackbone.wrap(tiny_vit(width=WIDTH, heads=2, img_size=16, depth=2))
        tasks = [[0, 1], [2, 3], [4, 5]]
        model = random_model(
            backbone, tasks, held_out=held_out, features=lambda label: backbone(patterns([label], 40, 100 + label)[0])
        )
        model.predictor = NearestKey()
        return model

    return make


def test_thresholds_by_rank() -> None:
    """Of 9 scores, a new one falls below the smallest with a chance of 1/10."""
    scores = torch.tensor([5.0, 1, 8, 3, 2, 9, 4, 7, 6]) / 10
    assert lower_threshold(scores, 0.1) == pytest.approx(0.1)
    assert lower_threshold(scores, 0.35) == pytest.approx(0.3)
    high = upper_threshold(scores, 0.2)
    assert (scores >= high).sum() == 1
    assert high == pytest.approx(0.8)
    for calibrated in (lower_threshold, upper_threshold):
        with pytest.raises(
            DataError, match=r"9 held-back features cannot promise a rate of 0\.05: at least 19 are needed"
        ):
            calibrated(scores, 0.05)
        for rate in (0.0, 1.0):
            with pytest.raises(ConfigError, match="between 0 and 1"):
                calibrated(scores, rate)


def test_promised_rates_hold_on_average() -> None:
    """Over many calibrations the chance for a new score is at most the rate, and close to it."""
    draw = torch.Generator().manual_seed(0)
    below, above = [], []
    for _ in range(400):
        scores, new = torch.randn(39, generator=draw), torch.randn(200, generator=draw)
        below.append((new < lower_threshold(scores, 0.1)).float().mean())
        above.append((new >= upper_threshold(scores, 0.1)).float().mean())
    for rates in (below, above):
        assert 0.085 < float(torch.stack(rates).mean()) < 0.105


def test_false_rejects_of_new_images(make_model: Make) -> None:
    model = make_model()
    part = calibrate(model, false_reject=0.1)
    assert part is model.parts["abstention"]
    assert part.calibration == {"false_reject": 0.1, "exact": True, "held_out": 120}
    keys = model.part("class_keys", Keys)
    held = keys.similarity(keys.held_out_HD).amax(1)
    assert part.similarity == pytest.approx(float(held.sort().values[11])), "the 12th of 120: 0.1 * 121 rounded down"
    x, _ = patterns(list(range(6)), 50, 7)
    refused = model.answer(x).abstained
    assert refused is not None
    assert 0.03 < float(refused.float().mean()) < 0.2


def test_the_unknown_are_the_other_tasks(make_model: Make) -> None:
    model = make_model()
    keys = model.part("class_keys", Keys)
    near = keys.similarity(keys.held_out_HD)
    wanted = [
        max(
            float(value)
            for value, column in zip(row, keys.column_M.tolist(), strict=True)
            if column // 2 != int(own) // 2
        )
        for row, own in zip(near, keys.held_out_column_H.tolist(), strict=True)
    ]
    assert np.allclose(unknown_scores(model).numpy(), wanted)
    part = calibrate(model, false_accept=0.25)
    assert part.similarity is not None
    assert (unknown_scores(model) >= part.similarity).sum() == 29, "0.25 * 121 is 30, so at most 29 reach it"
    assert part.calibration == {"false_accept": 0.25, "exact": False, "held_out": 120}


def test_refused_inputs_are_answered_by_the_bare_means(make_model: Make) -> None:
    model = make_model()
    x, _ = patterns([0, 3, 9, 10], 10, 3)
    before = model.answer(x)
    assert before.abstained is None
    calibrate(model, false_reject=0.05)
    answer = model.answer(x)
    refused = answer.abstained
    assert refused is not None
    assert 0 < int(refused.sum()) < len(x)
    assert torch.equal(answer.logits[~refused], before.logits[~refused])
    assert torch.equal(answer.adapter[~refused], before.adapter[~refused])
    assert (answer.adapter[refused] == -1).all()
    with torch.no_grad():
        f = model.backbone(x[refused])
    means = torch.stack([rows.mean(0) for rows in model.part("class_keys", Keys).keys_MD.split(20)])
    for row, logits in zip(f, answer.logits[refused], strict=True):
        assert torch.allclose(logits, F.cosine_similarity(row[None], means), atol=1e-5)
    assert torch.equal(answer.passes, before.passes), "the bare pass was needed anyway"


def test_confidence_too(make_model: Make) -> None:
    model = make_model()
    x, _ = patterns(list(range(6)), 20, 5)
    confidences = model.answer(x).logits.softmax(1).amax(1)
    part = calibrate(model, false_reject=0.1, confidences_N=confidences)
    assert part.confidence == pytest.approx(float(confidences.sort().values[11]))
    keys = model.part("class_keys", Keys)
    assert part.confidence is not None
    assert part.similarity is not None
    with torch.no_grad():
        near = keys.similarity(model.backbone(x)).amax(1)
    abstained = model.answer(x).abstained
    assert abstained is not None
    assert torch.equal(abstained, (near < part.similarity) | (confidences < part.confidence))
    assert int(abstained.sum()) > int((near < part.similarity).sum())


def test_saved_with_the_model(make_model: Make, tmp_path: Path) -> None:
    model = make_model()
    calibrate(model, false_reject=0.1)
    model.save(tmp_path / "model")
    loaded = AdapterModel.load(tmp_path / "model", model.backbone)
    assert loaded.part("abstention", Abstention).description() == model.part("abstention", Abstention).description()
    x, _ = patterns([1, 9], 10, 3)
    first, second = model.answer(x), loaded.answer(x)
    assert first.abstained is not None
    assert second.abstained is not None
    assert torch.equal(first.abstained, second.abstained)


def test_measures(make_model: Make) -> None:
    model = make_model()
    known, y = patterns(list(range(6)), 10, 3)
    unknown, _ = patterns([8, 9, 10, 11], 10, 4)
    free = open_set(model, [(known[:30], y[:30]), (known[30:], y[30:])], [unknown])
    assert free.coverage == 1.0
    assert free.false_accept == 1.0
    calibrate(model, false_reject=0.1)
    found = open_set(model, [(known, y)], [unknown[:15], unknown[15:]])
    answer, other = model.answer(known), model.answer(unknown)
    assert answer.abstained is not None
    assert other.abstained is not None
    assert found.coverage == pytest.approx(float((~answer.abstained).float().mean()))
    assert found.false_accept == pytest.approx(float((~other.abstained).float().mean()))
    assert found.routing == pytest.approx(float((answer.adapter == y // 2).float().mean()))
    assert found.accuracy == pytest.approx(float((answer.logits.argmax(1) == y).float().mean()))
    assert found.passes == 2.0
    keys = model.part("class_keys", Keys)
    with torch.no_grad():
        high, low = (keys.similarity(model.backbone(x)).amax(1) for x in (known, unknown))
    pairs = (high[:, None] > low).float() + 0.5 * (high[:, None] == low).float()
    assert found.auroc == pytest.approx(float(pairs.mean())), "the share of pairs in the right order"
    assert free.auroc == found.auroc
    with pytest.warns(DeprecationWarning, match="now unknown="):
        assert open_set(model, [(known, y)], strangers=[unknown]) == found
    with pytest.raises(ConfigError, match="strangers is the old name of unknown: pass unknown alone"):
        open_set(model, [(known, y)], [unknown], strangers=[unknown])
    with pytest.raises(DataError, match="does not know class 9"):
        open_set(model, [(unknown, torch.full((40,), 9))])


def test_targets_that_cannot_be_kept(make_model: Make) -> None:
    model = make_model(held_out=0)
    with pytest.raises(DataError, match="0 held-back features cannot promise"):
        calibrate(model, false_reject=0.1)
    for reject, accept in ((None, None), (0.1, 0.1)):
        with pytest.raises(ConfigError, match="give one target"):
            calibrate(model, false_reject=reject, false_accept=accept)
    with pytest.raises(ConfigError, match="for false_reject only"):
        calibrate(model, false_accept=0.1, confidences_N=torch.ones(99))
    with pytest.raises(ConfigError, match="a threshold is needed"):
        Abstention(None)
    assert "abstention" not in model.parts
    model.task_of_column[:] = 0
    with pytest.raises(DataError, match="at least two tasks"):
        calibrate(model, false_accept=0.1)
