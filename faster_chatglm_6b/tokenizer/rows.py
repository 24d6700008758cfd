"""Masks, positions and left padding of one tokenized row, for batches of prompts of different lengths."""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence
from typing import Any

import numpy as np


def context_length(input_ids: Sequence[int], bos_token_id: int) -> int:
    """Number of tokens before the first <sop> (all, if there is none)."""
    return input_ids.index(bos_token_id) if bos_token_id in input_ids else len(input_ids)


def attention_mask(length: int, context: int) -> np.ndarray:
    """bool [1, L, L], True = hidden: all see the first `context` tokens; the others see their past as well."""
    visible = np.tri(length, dtype=bool)
    visible[:, :context] = True
    return ~visible[None]


def position_ids(input_ids: Sequence[int], context: int, mask_token_ids: Sequence[int]) -> np.ndarray:
    """int64 [2, L]: positions and block positions.

    Positions count from 0; after the context they stay at the place of the first of `mask_token_ids` that the row has.
    Block positions are 0 in the context and 1, 2, ... after it.
    """
    length = len(input_ids)
    positions = np.zeros((2, length), dtype=np.int64)
    positions[0] = np.arange(length)
    positions[1, context:] = np.arange(1, length - context + 1)
    for mask_token_id in mask_token_ids:
        if mask_token_id in input_ids:
            positions[0, context:] = input_ids.index(mask_token_id)
            break
    return positions


def pad_on_the_left(row: MutableMapping[str, Any], count: int, pad_token_id: int, pad_token_type_id: int) -> None:
    """Put `count` hidden pads before everything that `row` has, in place.

    A [1, L, L] mask is padded with True (hidden), a 1-D one, which comes from elsewhere and means the opposite, with 0.
    """
    fills = {"input_ids": pad_token_id, "token_type_ids": pad_token_type_id, "special_tokens_mask": 1}
    for key, fill in fills.items():
        if key in row:
            row[key] = [fill] * count + list(row[key])
    if "attention_mask" in row:
        mask = np.asarray(row["attention_mask"])
        widths = [(count, 0)] if mask.ndim == 1 else [(0, 0)] * (mask.ndim - 2) + [(count, 0)] * 2
        row["attention_mask"] = np.pad(mask, widths, constant_values=mask.ndim > 1)
    row["position_ids"] = np.pad(np.asarray(row["position_ids"]), [(0, 0), (count, 0)])
