"""Class means of features under several adapters, side by side: what APER answers by."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from cl_adapters.errors import DataError
from cl_adapters.model.heads import PrototypeHead
from cl_adapters.parts.base import Part, parts


@parts.register("class_means")
class ClassMeans(Part):
    """One mean feature per class; answers by the cosine to it.

    Args:
        width: of the concatenated features.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.head = PrototypeHead(width)

    def forward(self, f_BW: Tensor) -> Tensor:
        """Cosines [B, C] of concatenated features [B, W] to the class means."""
        cosines_BC: Tensor = self.head(f_BW)
        return cosines_BC

    def description(self) -> dict[str, Any]:
        """Nothing besides the tensor."""
        return {}

    def check(self, classes: int, width: int) -> None:
        """Check the number of means too; their width is that of the adapters that are concatenated."""
        super().check(classes, width)
        rows, whole = self.head.prototypes.shape
        if rows not in (0, classes) or whole % width:
            raise DataError(f"{rows} means of width {whole} do not fit {classes} classes of width {width}")

    @classmethod
    def restore(cls, description: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> ClassMeans:
        """The part with these means.

        Raises:
            KeyError: there are none.
        """
        means_CW = tensors["head.prototypes"]
        part = cls(means_CW.shape[1])
        part.head.append(means_CW)
        return part
