"""Answers: what the model says of one file, in words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from cl_adapters.errors import ClAdaptersError
from cl_adapters.images import decode_image

if TYPE_CHECKING:
    from cl_adapters.model import AdapterModel
    from cl_adapters.predictors.base import Prediction, Predictor


@dataclass(frozen=True)
class Answer:
    """What :meth:`AdapterModel.predict_files` says about one file.

    Attributes:
        file: as given.
        label: class label of the best column.
        name: its class name.
        score: softmax of the logits at that column, in [0, 1].
        adapter: slot that answered; -1 is the bare backbone.
        ranking: (class name, score) of the best five.
        record: id of that adapter in the pool that the model was made from; None for the bare backbone, or no pool.
        abstained: the image is of no known class; label and ranking are then the nearest by the bare backbone.
    """

    file: str
    label: int
    name: str
    score: float
    adapter: int
    ranking: tuple[tuple[str, float], ...]
    record: str | None = None
    abstained: bool = False


def answer_files(
    model: AdapterModel, files: Sequence[str | Path], batch: int, predictor: Predictor | None
) -> list[Answer]:
    """Classify image files; see :meth:`AdapterModel.predict_files`."""
    preprocessing = model.backbone.preprocessing
    if preprocessing is None:
        raise ClAdaptersError("this backbone has no image preprocessing: call predict on prepared inputs")
    transform = preprocessing.eval_transform()
    answers: list[Answer] = []
    for start in range(0, len(files), batch):
        part = files[start : start + batch]
        images = torch.stack([transform(decode_image(Path(file))) for file in part])
        prediction = model.answer(images, predictor=predictor)
        answers += [explained(model, file, prediction, i) for i, file in enumerate(part)]
    return answers


def explained(model: AdapterModel, file: str | Path, prediction: Prediction, row: int) -> Answer:
    """One row of a prediction as an answer."""
    scores_C = prediction.logits[row].float().softmax(0).cpu()
    best = scores_C.topk(min(5, len(scores_C)))
    names = [model.name_of(model.classes[column]) for column in best.indices.tolist()]
    ranking = tuple(zip(names, best.values.tolist(), strict=True))
    slot = int(prediction.adapter[row])
    return Answer(
        file=str(file),
        label=model.classes[int(best.indices[0])],
        name=ranking[0][0],
        score=ranking[0][1],
        adapter=slot,
        ranking=ranking,
        record=model.record_of_slot[slot] if 0 <= slot < len(model.record_of_slot) else None,
        abstained=prediction.abstained is not None and bool(prediction.abstained[row]),
    )
