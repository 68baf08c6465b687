"""What a pool's records do not say of the model that they came from: model.json in the pool's folder.

    {"schema_version": 1, "predictor": {"type", "config"}, "anchor": [id, sha256] of the predictor's own adapter,
     "abstention": thresholds, "keys": what is kept of each class}

Without it a default predictor serves.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cl_adapters.config import to_plain
from cl_adapters.errors import PoolError
from cl_adapters.pool.blobs import read_file

if TYPE_CHECKING:
    from cl_adapters.model import AdapterModel
    from cl_adapters.pool.pool import AdapterPool

CARD = "model.json"
SCHEMA = 1


def read_card(pool: Path) -> dict[str, Any]:
    """What ``model.json`` says; empty where there is none.

    Raises:
        PoolError: it cannot be read, or is of a newer schema.
    """
    content = card_bytes(pool)
    return {} if content is None else _parsed(content, pool / CARD)


def has_card(pool: Path) -> bool:
    """Whether something stands in its place."""
    return (pool / CARD).exists() or (pool / CARD).is_symlink()


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
        plain = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise PoolError(f"{where} cannot be read as JSON; delete it to use the default predictor") from error
    if not isinstance(plain, dict) or plain.get("schema_version") != SCHEMA:
        raise PoolError(f"{where} is not of schema {SCHEMA}: upgrade cl-adapters, or delete it")
    return plain


def card_of(model: AdapterModel, pool: AdapterPool, names: Mapping[int, str]) -> dict[str, Any]:
    """What the records do not say of a model.

    Args:
        model: what was saved.
        pool: its records.
        names: id of the record of each slot.

    Returns:
        JSON-ready. The predictor's own adapter is named by id and, should that change, by content.
    """
    from cl_adapters.bank import BARE  # torch, which copying a pool does without
    from cl_adapters.parts.abstention import Abstention
    from cl_adapters.parts.keys import Keys
    from cl_adapters.predictors.base import predictors

    anchor = model.predictor.anchor
    parts = dict(model.parts.items())
    threshold, keys = parts.get("abstention"), parts.get("class_keys")
    return {
        "schema_version": SCHEMA,
        "predictor": {"type": predictors.name_of(model.predictor), "config": to_plain(model.predictor)},
        "anchor": None if anchor == BARE else [names[anchor], pool.get(names[anchor]).adapter_sha],
        "abstention": threshold.description() if isinstance(threshold, Abstention) else None,
        "keys": to_plain(keys.config) if isinstance(keys, Keys) else None,
    }
