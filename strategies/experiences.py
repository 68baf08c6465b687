"""Reading an Avalanche experience of either style."""

from __future__ import annotations

from typing import Any

from cl_adapters.errors import ClAdaptersError


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
    return sorted(int(label) for label in classes)
