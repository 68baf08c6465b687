"""Saying "none of these": thresholds with a known rate of error, and how well they work.

A feature under the bare backbone is compared with the keys of all classes: those of a model
(:mod:`cl_adapters.parts.keys`) or of an index (:mod:`cl_adapters.index.calibration`). Below a threshold on the score of
the nearest the input is of no known class. :func:`threshold_for` says what can be promised of a threshold.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cl_adapters.backbones.inputs import Inputs, to_device
from cl_adapters.config import renamed_keyword
from cl_adapters.errors import ClAdaptersError, ConfigError, DataError
from cl_adapters.model.classifier import Classifier
from cl_adapters.parts.abstention import Abstention
from cl_adapters.parts.keys import CLASS_KEYS, Keys, keys_of
from cl_adapters.predictors.base import Predictor


def calibrate(
    model: Classifier,
    *,
    false_reject: float | None = None,
    false_accept: float | None = None,
    confidences_N: Tensor | None = None,
) -> Abstention:
    """Set the model's threshold from the features that were held back in training; it is saved with model and pool.

    See :func:`threshold_for`; each task's held-back features act as unknown inputs to the keys of the other tasks.

    Args:
        model: with keys, some of them held back (``KeysConfig.held_out``).
        false_reject: target rate in (0, 1); give this one, or
        false_accept: this one.
        confidences_N: with ``false_reject``: largest softmax of the model's answers for N images of known classes that
            it was not trained on. Then a second threshold, on that, is set too, at the same rate: together they
            refuse at most twice as many.

    Returns:
        The model's part "abstention", new.

    Raises:
        ConfigError: not exactly one target, or one outside (0, 1).
        DataError: too few held-back features for the target.
        ClAdaptersError: no keys, or an index in their place, which has a threshold of its own.
    """
    if confidences_N is not None and false_reject is None and false_accept is not None:
        raise ConfigError("a threshold on confidence is calibrated for false_reject only")

    def known() -> Tensor:
        keys = _own_keys(model)
        return keys.similarity(keys.held_out_HD).amax(1)

    found, calibration = threshold_for(false_reject, false_accept, known, lambda: unknown_scores(model))
    confidence = None if confidences_N is None else lower_threshold(confidences_N, calibration["false_reject"])
    model.parts["abstention"] = made = Abstention(found, confidence, calibration)
    return made


def threshold_for(
    false_reject: float | None,
    false_accept: float | None,
    known: Callable[[], Tensor],
    unknown: Callable[[], Tensor],
) -> tuple[float, dict[str, Any]]:
    """The threshold on a score below which an input is refused, for one target rate.

    ``false_reject`` bounds the share of inputs of known classes that are refused. This one is exact: for new inputs
    drawn like the held-back ones the chance is at most the target, whatever their law (the rank of a new score among H
    others is uniform; Vovk et al. 2005, conformal prediction).

    ``false_accept`` bounds the share of inputs of unknown classes that are accepted. There are none to measure it with,
    so held-back features act as unknown to what was learned apart from them. It is an estimate: it holds as far as
    unknown classes are to the known ones what those learned apart are to each other.

    Args:
        false_reject: target rate in (0, 1); or
        false_accept: this one.
        known: gives the scores float32 [H] of the features that were held back in training, asked for a false_reject;
        unknown: those in the role of unknown inputs, asked for a false_accept.

    Returns:
        The threshold, and how it was found, as plain JSON.

    Raises:
        ConfigError: not exactly one target, or one outside (0, 1).
        DataError: too few scores for the target.
    """
    if (false_reject is None) == (false_accept is None):
        raise ConfigError("give one target: false_reject (of known classes) or false_accept (of unknown ones)")
    if false_reject is not None:
        known_H = known()
        calibration = {"false_reject": false_reject, "exact": True, "held_out": len(known_H)}
        return lower_threshold(known_H, false_reject), calibration
    assert false_accept is not None
    unknown_H = unknown()
    calibration = {"false_accept": false_accept, "exact": False, "held_out": len(unknown_H)}
    return upper_threshold(unknown_H, false_accept), calibration


def lower_threshold(scores_N: Tensor, rate: float) -> float:
    """The largest threshold below which a new score falls with a chance of at most ``rate``.

    Raises:
        ConfigError: a rate outside (0, 1).
        DataError: fewer than 1 / rate - 1 scores.
    """
    return float(scores_N.sort().values[_rank(len(scores_N), rate) - 1])


def upper_threshold(scores_N: Tensor, rate: float) -> float:
    """The smallest threshold that a new score reaches with a chance of at most ``rate``.

    Raises:
        ConfigError: a rate outside (0, 1).
        DataError: fewer than 1 / rate - 1 scores.
    """
    value = scores_N.sort(descending=True).values[_rank(len(scores_N), rate) - 1]
    return float(torch.nextafter(value, value.new_tensor(torch.inf)))


def _own_keys(model: Classifier) -> Keys:
    keys = keys_of(model)
    if not isinstance(keys, Keys):
        raise ClAdaptersError(
            "this model looks inputs up in an index, whose threshold it took: calibrate that one with "
            "cl_adapters.index.calibration.calibrate(index, ...), and make the model again"
        )
    return keys


def _rank(n: int, rate: float) -> int:
    if not 0 < rate < 1:
        raise ConfigError(f"a target rate lies between 0 and 1, got {rate}")
    rank = math.floor(rate * (n + 1) + 1e-9)
    if rank < 1:
        raise DataError(
            f"{n} held-back features cannot promise a rate of {rate}: at least {math.ceil(1 / rate) - 1} are needed. "
            "Train with keys=KeysConfig(held_out=...) larger, or take a higher target"
        )
    return rank


def unknown_scores(model: Classifier) -> Tensor:
    """For each held-back feature the cosine to the nearest key of all other tasks, float32 [H].

    Raises:
        DataError: fewer than two tasks.
    """
    keys = _own_keys(model)
    if model.num_tasks < 2 or len(model.task_of_column.unique()) < 2:
        raise DataError("false_accept needs at least two tasks: each is unknown to the others")
    near_HM = keys.similarity(keys.held_out_HD)
    task_C = model.task_of_column.to(near_HM.device)
    own_HM = task_C[keys.held_out_column_H][:, None] == task_C[keys.column_M]
    return near_HM.masked_fill(own_HM, -1.0).amax(1)


@dataclass(frozen=True)
class OpenSet:
    """How a model does on images of known classes and of classes that it has never seen.

    Attributes:
        accuracy: share of known images whose class is right, refused ones answered by the bare backbone included.
        routing: share of known images answered by the adapter of their class; None where nothing is routed.
        coverage: share of known images that are not refused; 1 without a threshold.
        false_accept: share of unknown images that are not refused; None without any.
        auroc: of the score of the nearest key, known against unknown; 0.5 is chance. None without unknown ones.
        passes: mean backbone passes per known image.
    """

    accuracy: float
    routing: float | None
    coverage: float
    false_accept: float | None
    auroc: float | None
    passes: float


def open_set(
    model: Classifier,
    known: Iterable[tuple[Inputs, Tensor]],
    unknown: Iterable[Inputs] = (),
    *,
    predictor: Predictor | None = None,
    strangers: Iterable[Inputs] | None = None,
) -> OpenSet:
    """Measure a model.

    Args:
        model: with keys where there are unknown inputs.
        known: batches of inputs and class labels (int64 [B]) that the model knows.
        unknown: batches of inputs of other classes.
        predictor: another predictor than the model's own.
        strangers: the old name of ``unknown``.

    Raises:
        ClAdaptersError: no known input.
        DataError: a label that the model does not know.
    """
    from sklearn.metrics import roc_auc_score

    if strangers is not None:
        unknown = renamed_keyword("strangers", "unknown", strangers, unknown or None)
    right, routed, kept, passes, near = [], [], [], [], [torch.empty(0)]
    for x, y in known:
        columns_B = model.columns_of(y)
        if (columns_B < 0).any():
            raise DataError(f"the model does not know class {int(y[columns_B < 0][0])}; give such images as unknown")
        answer = model.answer(x, predictor=predictor)
        right.append(answer.logits.argmax(1).cpu() == columns_B)
        routed.append(answer.adapter == model.slot_of_column[columns_B])
        kept.append(_kept(answer.abstained, len(columns_B)))
        passes.append(answer.passes)
        near.append(_near(model, x))
    if not right:
        raise ClAdaptersError("nothing to measure: give at least one batch of known classes")
    far, accepted = [torch.empty(0)], []
    for x in unknown:
        answer = model.answer(x, predictor=predictor)
        accepted.append(_kept(answer.abstained, len(answer.logits)))
        far.append(_near(model, x))
    scores, truth = torch.cat([*near, *far]), [1] * len(torch.cat(near)) + [0] * len(torch.cat(far))
    return OpenSet(
        accuracy=_share(right),
        routing=_share(routed) if model.num_slots else None,
        coverage=_share(kept),
        false_accept=_share(accepted) if accepted else None,
        auroc=float(roc_auc_score(truth, scores.numpy())) if accepted and 1 in truth else None,
        passes=float(torch.cat(passes).mean()),
    )


def _kept(abstained_B: Tensor | None, batch: int) -> Tensor:
    return torch.ones(batch, dtype=torch.bool) if abstained_B is None else ~abstained_B


def _near(model: Classifier, x: Inputs) -> Tensor:
    """Score of the nearest key, float32 [B]; nothing where there are no keys."""
    if CLASS_KEYS not in model.parts:
        return torch.empty(0)
    with torch.inference_mode():
        return keys_of(model).nearest(model.features(to_device(x, model.device), None), 1)[0][:, 0].cpu()


def _share(flags: list[Tensor]) -> float:
    return float(torch.cat(flags).float().mean())
