"""Reading an Avalanche experience of either style."""

from __future__ import annotations

from typing import Any

from cl_adapters.errors import ClAdaptersError, DataError


def experience_classes(experience: Any) -> list[int]:
    """Class labels of an experience of either Avalanche style (a set, a list, or only targets), sorted.

    Raises:
        ClAdaptersError: it has neither classes nor targets.
    """
    classes = getattr(experience, "classes_in_this_experience", None)
    if classes is None:
        targets = getattr(experience.dataset, "targets", None)
        if targets is None:
            raise ClAdaptersError("this experience has neither classes_in_this_experience nor dataset.targets")
        classes = getattr(targets, "uniques", None) or set(targets)
    return sorted({int(label) for label in classes})


def check_experience(experience: Any) -> list[int]:
    """Class labels of an experience that can be trained on, sorted.

    Raises:
        DataError: it has no sample, a class without any, or samples of a class that it does not name.
    """
    if not len(experience.dataset):
        raise DataError("this experience has no training sample: drop the empty task from the stream")
    labels = experience_classes(experience)
    targets = getattr(experience.dataset, "targets", None)
    if targets is not None:
        present = {int(label) for label in getattr(targets, "uniques", None) or set(targets)}
        for wrong, text in (
            (set(labels) - present, "has no training sample of"),
            (present - set(labels), "does not name"),
        ):
            if wrong:
                raise DataError(f"this experience {text} classes {sorted(wrong)}: its classes and its data must agree")
    return labels
