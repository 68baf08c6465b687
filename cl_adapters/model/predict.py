"""Answers: what the model says of one file or text, in words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cl_adapters.backbones.encode import image_inputs, image_preprocessing, text_inputs
from cl_adapters.backbones.tokens import mask_of
from cl_adapters.config import counted
from cl_adapters.errors import DataError
from cl_adapters.model.classifier import Classifier
from cl_adapters.predictors.base import Prediction, Predictor


@dataclass(frozen=True)
class Answer:
    """What :meth:`Classifier.predict_files` says about one file, or :meth:`Classifier.predict_texts` of one text.

    Attributes:
        input: path of the file as given, or the text itself.
        label: class label of the best column.
        name: its class name.
        score: softmax of the logits at that column, in [0, 1].
        adapter: slot that answered; -1 is the bare backbone.
        ranking: (class name, score) of the best five.
        record: id of that adapter in the pool that the model was made from; None for the bare backbone, or no pool.
        abstained: the input is of no known class; label and ranking are then the nearest by the bare backbone.
    """

    input: str
    label: int
    name: str
    score: float
    adapter: int
    ranking: tuple[tuple[str, float], ...]
    record: str | None = None
    abstained: bool = False

    @property
    def file(self) -> str:
        """Another name of ``input``."""
        return self.input


def answer_files(
    model: Classifier, files: Sequence[str | Path], batch: int, predictor: Predictor | None
) -> list[Answer]:
    """Classify image files; see :meth:`Classifier.predict_files`."""
    image_preprocessing(model.backbone)  # another kind of backbone is refused also where there is no file
    batch = counted(batch, "batch")
    if isinstance(files, str | Path):
        raise DataError("a list of files is expected, got one file: put it into a list")
    answers: list[Answer] = []
    for start in range(0, len(files), batch):
        part = files[start : start + batch]
        prediction = model.answer(image_inputs(model.backbone, part), predictor=predictor)
        answers += [explained(model, file, prediction, i) for i, file in enumerate(part)]
    return answers


def answer_texts(model: Classifier, texts: Sequence[str], batch: int, predictor: Predictor | None) -> list[Answer]:
    """Classify texts, those of similar length together; see :meth:`Classifier.predict_texts`."""
    batch = counted(batch, "batch")
    tokens_BN = text_inputs(model.backbone, texts)
    order_B = mask_of(tokens_BN).sum(1).argsort(descending=True, stable=True)
    answers: dict[int, Answer] = {}
    for rows in order_B.split(batch) if len(texts) else ():
        prediction = model.answer(tokens_BN[rows], predictor=predictor)
        answers |= {row: explained(model, texts[row], prediction, i) for i, row in enumerate(rows.tolist())}
    return [answers[row] for row in range(len(texts))]


def explained(model: Classifier, given: str | Path, prediction: Prediction, row: int) -> Answer:
    """One row of a prediction as an answer."""
    scores_C = prediction.logits[row].float().softmax(0).cpu()
    best = scores_C.topk(min(5, len(scores_C)))
    names = [model.name_of(model.classes[column]) for column in best.indices.tolist()]
    ranking = tuple(zip(names, best.values.tolist(), strict=True))
    slot = int(prediction.adapter[row])
    return Answer(
        input=str(given),
        label=model.classes[int(best.indices[0])],
        name=ranking[0][0],
        score=ranking[0][1],
        adapter=slot,
        ranking=ranking,
        record=model.record_of_slot[slot] if 0 <= slot < len(model.record_of_slot) else None,
        abstained=prediction.abstained is not None and bool(prediction.abstained[row]),
    )
