"""Pad rows and batches on the left, with ChatGLM-6B's masks and positions."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any

import numpy as np
from transformers.utils import PaddingStrategy


class PaddingMixin:
    """``pad`` of a ``PreTrainedTokenizer``, for masks [1, L, L] and positions [2, L]."""

    def pad(self, encoded_inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """Pad as ``PreTrainedTokenizer.pad`` does, also rows that already have masks [1, L, L] of different L."""
        if isinstance(encoded_inputs, (list, tuple)) and encoded_inputs and isinstance(encoded_inputs[0], Mapping):
            encoded_inputs = {key: [row[key] for row in encoded_inputs] for key in encoded_inputs[0]}
        if isinstance(encoded_inputs, Mapping):
            mask = encoded_inputs.get("attention_mask")
            if isinstance(mask, list) and mask and getattr(mask[0], "ndim", 0) > 1:
                # Newer transformers stack a list of masks unpadded; a tuple goes to _pad row by row.
                encoded_inputs = {**encoded_inputs, "attention_mask": tuple(mask)}
        return super().pad(encoded_inputs, *args, **kwargs)

    def _pad(
        self,
        encoded_inputs: MutableMapping[str, Any],
        max_length: int | None = None,
        padding_strategy: PaddingStrategy = PaddingStrategy.DO_NOT_PAD,
        pad_to_multiple_of: int | None = None,
        padding_side: str | None = None,
        return_attention_mask: bool | None = None,
        **kwargs: Any,
    ) -> MutableMapping[str, Any]:
        """Pad one row on the left and give it ``attention_mask`` and ``position_ids``.

        A 1-D attention mask that came with the row (1 = look at) keeps that form.

        Raises:
            ValueError: the padding side is not "left".
        """
        side = padding_side if padding_side is not None else self.padding_side
        if padding_strategy != PaddingStrategy.DO_NOT_PAD and side != "left":
            raise ValueError(f"padding_side is {side!r}: ChatGLM-6B can only be padded on the left; set it to 'left'.")
        input_ids = list(encoded_inputs["input_ids"])
        if padding_strategy == PaddingStrategy.LONGEST:
            max_length = len(input_ids)
        if max_length is None:
            return encoded_inputs
        if pad_to_multiple_of is not None:
            max_length = -(-max_length // pad_to_multiple_of) * pad_to_multiple_of
        if return_attention_mask is None:
            return_attention_mask = "attention_mask" in self.model_input_names
        context = context_length(input_ids, self.bos_token_id)
        if return_attention_mask and "attention_mask" not in encoded_inputs:
            encoded_inputs["attention_mask"] = attention_mask(len(input_ids), context)
        if "position_ids" not in encoded_inputs:
            mask_token_ids = (self.gmask_token_id, self.mask_token_id)
            encoded_inputs["position_ids"] = position_ids(input_ids, context, mask_token_ids)
        missing = max_length - len(input_ids)
        if padding_strategy != PaddingStrategy.DO_NOT_PAD and missing > 0:
            pad_on_the_left(encoded_inputs, missing, self.pad_token_id, self.pad_token_type_id)
        return encoded_inputs


def context_length(input_ids: Sequence[int], bos_token_id: int) -> int:
    """Count the tokens before the first <sop>: all of them if there is none."""
    return input_ids.index(bos_token_id) if bos_token_id in input_ids else len(input_ids)


def attention_mask(length: int, context: int) -> np.ndarray:
    """Return bool [1, L, L], True = hidden: every token sees the first ``context`` ones and its own past."""
    visible = np.tri(length, dtype=bool)
    visible[:, :context] = True
    return ~visible[None]


def position_ids(input_ids: Sequence[int], context: int, mask_token_ids: Sequence[int]) -> np.ndarray:
    """Return positions and block positions, int64 [2, L].

    Positions count from 0. After the context they stay at the place of the first of ``mask_token_ids`` that the row
    has. Block positions are 0 in the context and 1, 2, ... after it.
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
    """Put ``count`` hidden pads before everything that ``row`` has, in place.

    A mask [1, L, L] is padded with True (hidden). A 1-D mask comes from elsewhere and means the opposite: it gets 0.
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
