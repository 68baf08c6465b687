"""The identity of a backbone: what has to be the same for adapters to fit, and how files note it. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cl_adapters.config import to_plain
from cl_adapters.errors import IncompatibleBackbone

if TYPE_CHECKING:
    from cl_adapters.backbones.frozen import FrozenBackbone


@dataclass(frozen=True, kw_only=True)
class BackboneCard:
    """Which backbone adapters belong to; as plain values in the files of models and pools.

    Attributes:
        name: as in :class:`cl_adapters.FrozenBackbone`.
        source: arguments of ``FrozenBackbone.load`` that give it again; empty for a wrapped module.
        fingerprint: SHA-256 of weights, preprocessing (with the tokenizer of texts) and pooling.
        num_features: D.
        preprocessing: of images or texts, as plain values; None where inputs are neither.
    """

    name: str
    source: dict[str, Any]
    fingerprint: str
    num_features: int
    preprocessing: dict[str, Any] | None

    @classmethod
    def of(cls, backbone: FrozenBackbone) -> BackboneCard:
        """The card of a backbone."""
        return cls(
            name=backbone.name,
            source=dict(backbone.source),
            fingerprint=backbone.fingerprint,
            num_features=backbone.num_features,
            preprocessing=None if backbone.preprocessing is None else to_plain(backbone.preprocessing),
        )

    def check(self, other: BackboneCard | FrozenBackbone, what: str = "backbone") -> None:
        """Check that a backbone, or that of another card, is the same one; ``what`` it is stands in the message.

        Raises:
            IncompatibleBackbone: names both fingerprints.
        """
        if other.fingerprint != self.fingerprint:
            raise IncompatibleBackbone(
                f"these adapters belong to backbone {self.name!r} with fingerprint {self.fingerprint[:16]}, but "
                f"{what} {other.name!r} has {other.fingerprint[:16]}: same weights, preprocessing and pooling are "
                "needed"
            )
