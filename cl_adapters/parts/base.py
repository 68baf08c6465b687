"""What a part is: named tensors, and a JSON description from which an equal part can be made around them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from cl_adapters.errors import DataError
from cl_adapters.registry import Registry


class Part(nn.Module, ABC):
    """Base of the parts: routers, descriptors, sums of a ridge classifier, counters.

    A strategy puts its parts into ``model.parts`` by name; they are saved, loaded and moved with the model, and its
    predictor reads them there.

    Attributes:
        floats: names of tensors that are float32, where whole numbers would be taken too.
    """

    floats: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def description(self) -> dict[str, Any]:
        """JSON-ready structure: whatever :meth:`restore` needs besides the tensors."""

    def tensors(self) -> dict[str, Tensor]:
        """Everything that is saved; default the whole ``state_dict``."""
        return {name: value.detach() for name, value in self.state_dict().items()}

    def check(self, classes: int, width: int) -> None:
        """Check that this part can serve a model with so many classes and features of this width.

        Raises:
            DataError: it cannot; the default looks at the type of the numbers only.
        """
        for name, value in self.state_dict().items():
            if value.dtype != torch.float32 and (value.is_floating_point() or name in self.floats):
                raise DataError(f"{name} is {value.dtype}, float32 is expected")

    @classmethod
    @abstractmethod
    def restore(cls, description: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Part:
        """The part of which these are :meth:`description` and :meth:`tensors`.

        Raises:
            KeyError: a tensor or a key is missing.
        """


parts: Registry[type[Part]] = Registry("model part", "cl_adapters.parts", group="cl_adapters.parts")
