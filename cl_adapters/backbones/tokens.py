"""Texts as one plain tensor: token ids with -1 where there is no token.

A batch of texts is tokens_BN, int64 [B, N]. So replay buffers, loaders, caches and memories, which know nothing of
masks, take texts as they take images. Between the blocks of an encoder texts are h_BND, with NaN where there is no
token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from cl_adapters.errors import DataError

NO_TOKEN = -1
"""Stands where a text has no token."""
_KEYS = {"input_ids", "attention_mask", "token_type_ids"}


def from_rows(rows: Sequence[Sequence[int]], width: int | None = None) -> Tensor:
    """Token ids as tokens_BN, int64 [B, N], filled on the right; ``width``: N, default the length of the longest text.

    Raises:
        DataError: a row is longer than ``width``.
    """
    longest = max(map(len, rows), default=0)
    width = longest if width is None else width
    if longest > width:
        raise DataError(f"a text of {longest} tokens does not fit {width} columns")
    tokens_BN = torch.full((len(rows), width), NO_TOKEN)
    for place, row in enumerate(rows):
        tokens_BN[place, : len(row)] = torch.tensor(row, dtype=torch.int64)
    return tokens_BN


def is_tokens(x: Mapping[str, Tensor]) -> bool:
    """Whether a mapping says no more than token ids and where they are (segments that are all 0 say nothing)."""
    segments = x.get("token_type_ids")
    return "input_ids" in x and set(x) <= _KEYS and (segments is None or not bool(segments.any()))


def from_mapping(x: Mapping[str, Tensor]) -> Tensor:
    """What a tokenizer of transformers gives (ids int64 [B, N], perhaps a mask) as tokens_BN: -1 where that is 0.

    Ids of another type than whole numbers stay as they are, for whoever checks the tokens.
    """
    mask, ids_BN = x.get("attention_mask"), x["input_ids"]
    if not ids_BN.is_floating_point() and ids_BN.dtype is not torch.bool:
        ids_BN = ids_BN.long()
    return ids_BN if mask is None else ids_BN.masked_fill(mask == 0, NO_TOKEN)


def mask_of(tokens_BN: Tensor) -> Tensor:
    """Where there is a token, bool [B, N]."""
    return tokens_BN >= 0


def packed(tokens_BN: Tensor) -> Tensor:
    """The same texts without gaps: tokens to the left, in their order, and no column that is empty in all rows.

    So left padding, right padding and the width of the batch make no difference to what is computed.
    """
    return _to_the_left(tokens_BN, mask_of(tokens_BN))


def padded(h_BND: Tensor, mask_BN: Tensor, width: int) -> Tensor:
    """Hidden states in one shape for every batch: NaN where there is no token.

    Args:
        h_BND: hidden states of packed texts, float [B, n, D].
        mask_BN: bool [B, n], where they have tokens.
        width: N, at least n.

    Returns:
        float [B, N, D].
    """
    h_BND = h_BND.masked_fill(~mask_BN[..., None], torch.nan)
    return torch.nn.functional.pad(h_BND, (0, 0, 0, width - h_BND.shape[1]), value=torch.nan)


def unpadded(h_BND: Tensor) -> tuple[Tensor, Tensor]:
    """What :func:`padded` was given: hidden states [B, n, D], 0 at empty places, and their mask, bool [B, n].

    Raises:
        DataError: a text without any token.
    """
    mask_BN = ~h_BND[..., 0].isnan()
    check_no_empty_text(mask_BN)
    tokens_BN = torch.where(mask_BN, 0, NO_TOKEN)
    h_BND = _to_the_left(h_BND, mask_BN)
    mask_BN = mask_of(packed(tokens_BN))
    return h_BND.masked_fill(~mask_BN[..., None], 0), mask_BN


def check_no_empty_text(mask_BN: Tensor) -> None:
    """Check that every text has a token.

    Raises:
        DataError: names the first row that has none.
    """
    empty = (~mask_BN.any(1)).nonzero().flatten().tolist()
    if empty:
        raise DataError(
            f"row {empty[0]} of the batch has no token (every place is empty), so it has no features: leave it out, or "
            "make tokens with backbone.preprocessing.encode, which gives even an empty text one"
        )


def _to_the_left(values: Tensor, mask_BN: Tensor) -> Tensor:
    """Move what the mask names to the front of each row, and cut the columns that are then empty in all."""
    width = int(mask_BN.sum(1).max()) if len(mask_BN) else 0
    if bool((mask_BN[:, 1:] & ~mask_BN[:, :-1]).any()):  # a token behind an empty place
        order = (~mask_BN).to(torch.uint8).argsort(dim=1, stable=True)
        rows = torch.arange(len(values), device=values.device)[:, None]
        values = values[rows, order]
    return values[:, :width]
