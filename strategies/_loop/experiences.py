"""Reading an Avalanche experience of either style."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from avalanche.benchmarks.scenarios.online import OnlineCLExperience

from cl_adapters.errors import ClAdaptersError, DataError
from cl_adapters.model.state import class_label


def experience_classes(experience: Any) -> list[int]:
    """Class labels of an experience of either Avalanche style (a set, a list, or only targets), sorted.

    A part of another experience may name the classes of the whole: its classes are those of its samples.

    Raises:
        ClAdaptersError: it has neither classes nor targets.
        DataError: a label that cannot be one.
    """
    targets = getattr(experience.dataset, "targets", None)
    classes = getattr(experience, "classes_in_this_experience", None)
    if classes is not None:
        named = {class_label(label, "a class of this experience") for label in classes}
        if targets is not None and isinstance(experience, OnlineCLExperience):
            named &= _labels(targets)
        return sorted(named)
    if targets is None:
        raise ClAdaptersError("this experience has neither classes_in_this_experience nor dataset.targets")
    return sorted(_labels(targets))


def check_experience(experience: Any) -> list[int]:
    """Class labels of an experience that can be trained on, sorted.

    Raises:
        DataError: it has no sample, a class without any, samples of a class that it does not name, or a label that
            cannot be one.
    """
    if not len(experience.dataset):
        raise DataError("this experience has no training sample: drop the empty task from the stream")
    targets = getattr(experience.dataset, "targets", None)
    present = None if targets is None else _labels(targets)  # first, since it can say which sample is wrong
    labels = experience_classes(experience)
    if present is not None:
        for wrong, text in (
            (set(labels) - present, "has no training sample of"),
            (present - set(labels), "does not name"),
        ):
            if wrong:
                raise DataError(f"this experience {text} classes {sorted(wrong)}: its classes and its data must agree")
    return labels


def _labels(targets: Iterable[Any]) -> set[int]:
    """The different labels among those of the samples.

    Raises:
        DataError: names the first sample whose label cannot be one.
    """
    try:
        return {class_label(label, "a sample") for label in getattr(targets, "uniques", None) or set(targets)}
    except (DataError, TypeError):  # the latter of labels without a hash, such as lists; now one by one, for the place
        return {class_label(label, f"training sample {place}") for place, label in enumerate(targets)}
