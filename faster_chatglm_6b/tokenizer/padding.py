"""Left padding of rows and batches, with ChatGLM-6B's masks and positions."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from typing import Any

from transformers.utils import PaddingStrategy

from .rows import attention_mask, context_length, pad_on_the_left, position_ids


class PaddingMixin:
    """``pad`` for a ``PreTrainedTokenizer`` whose masks are [1, L, L] and whose positions are [2, L]."""

    def pad(self, encoded_inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """`PreTrainedTokenizer.pad`, also for rows that already have [1, L, L] masks of different L."""
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
        """Pad one row on the left and give it `attention_mask` and `position_ids` (see the class).

        A 1-D attention mask that came with the row (1 = look at) is kept in that form.
        Raises ValueError if the padding side is not "left".
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
