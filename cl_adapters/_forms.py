"""What may stand in the JSON files of models and pools: numbers, digests, texts; and such values in messages."""

from __future__ import annotations

import re
import unicodedata
from typing import Annotated, Any

from pydantic import Field

from cl_adapters.errors import ClAdaptersError

SHA = re.compile(r"[0-9a-f]{64}")
LONGEST = 1000
"""Characters of the longest text."""

Label = Annotated[int, Field(strict=True)]
"""A class label, see :func:`check_label`. Strict: true and "1" are none, though pydantic would take them for 1."""
Count = Annotated[int, Field(strict=True, ge=0, lt=2**63)]
"""A number of things, or the number of one: a task, a slot, a block."""


def check_label(label: int, error: type[ClAdaptersError]) -> None:
    """Check a class label.

    Raises:
        ClAdaptersError: of the type ``error``; it has more than 64 bits.
    """
    if not -(2**63) <= label < 2**63:
        raise error(f"class label {label} does not fit into 64 bits")


def check_text(what: str, text: str, error: type[ClAdaptersError]) -> None:
    """Check a text that terminals will show.

    Raises:
        ClAdaptersError: of the type ``error``; it is too long, or has control characters.
    """
    if len(text) > LONGEST:
        raise error(f"{what} of {len(text)} characters; at most {LONGEST} are stored")
    if any(unicodedata.category(character) in ("Cc", "Cs") for character in text):
        raise error(f"{what} {shown(text)} has control characters, which would reach a terminal")


def shown(value: Any) -> str:
    """A value from a file, as part of a message: quoted, on one line, cut when long."""
    return clipped(ascii(value), 80)


def clipped(text: str, length: int) -> str:
    """The text, with its end left out where it is long."""
    return text if len(text) <= length else f"{text[:length]}..."
