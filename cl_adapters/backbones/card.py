"""The identity of a backbone: what has to be the same for adapters to fit, and how files note it. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cl_adapters._forms import SHA, check_text, shown
from cl_adapters.config import to_plain
from cl_adapters.errors import ClAdaptersError, IncompatibleBackbone, StorageError

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

    def check_form(self, error: type[ClAdaptersError]) -> None:
        """Check that the texts and numbers can stand in a file.

        Raises:
            ClAdaptersError: of the type ``error``; one has the wrong form.
        """
        check_text("backbone.name", self.name, error)
        if not SHA.fullmatch(self.fingerprint):
            raise error(f"backbone.fingerprint {shown(self.fingerprint)} is no SHA-256")
        if self.num_features < 1:
            raise error(f"backbone.num_features is {self.num_features}")
        if self.source and not isinstance(self.source.get("name"), str):
            raise error(f"backbone.source names no backbone: {shown(self.source)}")

    def opened(self, where: str, error: type[StorageError]) -> FrozenBackbone:
        """What the source gives, unchecked; ``where`` it stands is for messages.

        Raises:
            BackboneUnavailable: its weights cannot be had here.
            StorageError: of the type ``error``; the source is none.
        """
        from cl_adapters.backbones.frozen import FrozenBackbone

        try:
            return FrozenBackbone.load(**self.source)
        except (ClAdaptersError, OSError, MemoryError):
            raise
        except Exception as problem:  # values of other types fail wherever they are first used
            raise error(f"{where} has a source of the backbone that is none: {problem}") from problem

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
