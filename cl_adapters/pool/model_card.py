"""What a pool's records do not say of the model that they came from: model.json in the pool's folder.

    {"schema_version": 1, "predictor": {"type", "config"}, "anchor": [id, sha256] of the predictor's own adapter,
     "abstention": thresholds, "keys": what is kept of each class}

Without it a default predictor serves.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from cl_adapters._io import parse_json
from cl_adapters.errors import PoolError
from cl_adapters.pool.blobs import read_file
from cl_adapters.pool.record import Record

CARD = "model.json"
SCHEMA = 1


def read_card(pool: Path) -> dict[str, Any]:
    """What ``model.json`` says; empty where there is none.

    Raises:
        PoolError: it cannot be read, or is of a newer schema.
    """
    content = card_bytes(pool)
    return {} if content is None else _parsed(content, pool / CARD)


def card_bytes(pool: Path) -> bytes | None:
    """The bytes of a card that :func:`read_card` understands; None where there is none.

    Raises:
        PoolError: it cannot be read, or is of a newer schema.
    """
    if not (pool / CARD).exists():
        return None
    content = read_file(pool, CARD)
    _parsed(content, pool / CARD)
    return content


def _parsed(content: bytes, where: Path) -> dict[str, Any]:
    try:
        plain = parse_json(content)
    except ValueError as error:
        raise PoolError(f"{where} cannot be read as JSON; delete it to use the default predictor") from error
    if not isinstance(plain, dict) or plain.get("schema_version") != SCHEMA:
        raise PoolError(f"{where} is not of schema {SCHEMA}: upgrade cl-adapters, or delete it")
    wrong = [key for key, fits in FORMS.items() if not fits(plain.get(key))]
    if wrong:
        raise PoolError(
            f"{where} is damaged: its {wrong[0]!r} is in no known form; delete it for the default predictor"
        )
    return plain


def _is_mapping(value: Any) -> bool:
    return value is None or isinstance(value, dict)


def _is_anchor(value: Any) -> bool:
    return value is None or (isinstance(value, list) and len(value) == 2 and all(isinstance(one, str) for one in value))


def _is_threshold(value: Any) -> bool:
    if value is None:
        return True
    if not isinstance(value, dict) or value.keys() != {"similarity", "confidence", "calibration"}:
        return False
    limits = [limit for limit in (value["similarity"], value["confidence"]) if limit is not None]
    finite = all(isinstance(limit, int | float) and math.isfinite(limit) for limit in limits)
    return bool(limits) and finite and isinstance(value["calibration"], dict)


FORMS: dict[str, Callable[[Any], bool]] = {
    "predictor": _is_mapping,
    "anchor": _is_anchor,
    "abstention": _is_threshold,
    "keys": _is_mapping,
}
"""What each entry has to look like; it may be missing."""


def anchor_of(card: Mapping[str, Any], records: Iterable[Record]) -> Record | None:
    """The record of the predictor's own adapter, also where it has been renamed; None: it has none, or it is gone.

    The content counts before the id, which another adapter may have by now.
    """
    anchor, present = card.get("anchor"), list(records)
    if anchor is None:
        return None
    same = [record for record in present if record.adapter_sha == anchor[1]]
    same += [record for record in present if record.id == anchor[0]]
    return same[0] if same else None
