"""Find the parts of a ChatGLM prompt, and derive positions and visibility from them.

A prompt is ``text [gMASK] <sop> answer``. Everything before the first ``<sop>`` is the context, which every row sees in
both directions. From ``<sop>`` on, each row sees the context and what came before it (prefix LM, Du et al. 2022).
Answer rows carry the position of ``[gMASK]`` (or of ``[MASK]`` if there is none) and count block positions 1, 2, 3...
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..configuration_chatglm import ChatGLMConfig
from .arguments import check_ids, check_range


@dataclass(frozen=True)
class PromptLayout:
    """Layout of a batch of left-padded prompts; every tensor is int64 [B] and lives on the CPU.

    Slots are columns of the padded batch; positions count from each row's first real token.

    Attributes:
        first_slot: slot of the first real token, the number of left pads.
        sop_slot: slot of the first ``<sop>``, the end of the context.
        mask_position: position of the first ``[gMASK]``, or of the first ``[MASK]`` if there is no ``[gMASK]``.
        has_gmask: bool [B], whether there is a ``[gMASK]``.
        hidden_slots: bool [B, L], further slots that the attention mask hides (right padding), or None.
        begins_with_pad: whether the mask shows a pad id at the start of a row, which would be padding without a mask.
    """

    first_slot: torch.Tensor
    sop_slot: torch.Tensor
    mask_position: torch.Tensor
    has_gmask: torch.Tensor
    hidden_slots: torch.Tensor | None = None
    begins_with_pad: bool = False

    @classmethod
    def of(
        cls, input_ids: torch.Tensor, config: ChatGLMConfig, attention_mask: torch.Tensor | None = None
    ) -> "PromptLayout":
        """Read the layout from token ids.

        Args:
            input_ids: int64 [B, L].
            config: gives the special ids.
            attention_mask: [B, L], 1 for real tokens and 0 for padding. None: a run of pad ids at the start of a row is
                padding.

        Raises:
            ValueError: an id out of the vocabulary, a row without ``[gMASK]`` and ``[MASK]``, or without ``<sop>``, or
                a mask of another shape.
        """
        check_ids(input_ids)
        # numpy takes a third of torch's time for arrays as small as these.
        ids = input_ids.detach().cpu().numpy()
        check_range(int(ids.min()), int(ids.max()), config.vocab_size)
        hidden, begins_with_pad = None, False
        no_pad = ids != config.pad_token_id
        if attention_mask is None:
            first_slot = no_pad.argmax(axis=1)
        else:
            real = attention_mask.detach().cpu()[:, : ids.shape[1]].bool().numpy()
            if real.shape != ids.shape:
                raise ValueError(
                    f"attention_mask has shape {list(attention_mask.shape)}, but input_ids have "
                    f"{list(input_ids.shape)}; pass one 0 or 1 for each token."
                )
            first_slot = real.argmax(axis=1)
            if not real.any(axis=1).all():
                raise ValueError("attention_mask hides every token of a row; pass 1 for the tokens of the prompt.")
            hidden = ~real & (np.arange(ids.shape[1]) >= first_slot[:, None])
            hidden = torch.from_numpy(hidden) if hidden.any() else None
            begins_with_pad = bool((no_pad.argmax(axis=1) > first_slot).any())
        is_gmask = ids == config.gmask_token_id
        has_gmask, mask_slot = is_gmask.any(axis=1), is_gmask.argmax(axis=1)
        if not has_gmask.all():
            is_mask = ids == config.mask_token_id
            if not (has_gmask | is_mask.any(axis=1)).all():
                raise ValueError(
                    f"input_ids hold neither [gMASK] ({config.gmask_token_id}) nor [MASK] ({config.mask_token_id}), "
                    "but every prompt needs one of them; make the ids with the checkpoint's tokenizer."
                )
            mask_slot = np.where(has_gmask, mask_slot, is_mask.argmax(axis=1))
        is_sop = ids == config.bos_token_id
        if not is_sop.any(axis=1).all():
            raise ValueError(
                f"input_ids hold no <sop> ({config.bos_token_id}), but every prompt needs it after its [gMASK] or "
                "[MASK]; make the ids with the checkpoint's tokenizer."
            )
        slots = (first_slot, is_sop.argmax(axis=1), mask_slot - first_slot, has_gmask)
        return cls(*map(torch.from_numpy, slots), hidden, begins_with_pad)

    def attention_mask(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Return the mask of the left padding for ``input_ids``, int64 [B, L] on their device, 1 for real tokens."""
        if not any(self.first_slot.tolist()):
            # Made on the device: nothing is copied there, which the host would wait for.
            return torch.ones(input_ids.shape, dtype=torch.int64, device=input_ids.device)
        slots = torch.arange(input_ids.shape[1])
        return (slots >= self.first_slot[:, None]).long().to(input_ids.device)

    @property
    def is_padded(self) -> bool:
        """Whether any slot of any row is hidden as padding."""
        return self.hidden_slots is not None or any(self.first_slot.tolist())

    @property
    def common_prefix(self) -> int | None:
        """Length of the context if it is the same in every row and nothing is padded, else None."""
        if self.is_padded or bool((self.sop_slot != self.sop_slot[0]).any()):
            return None
        return int(self.sop_slot[0])

    def position_ids(self, start: int, stop: int, two_dimensional: bool = True) -> torch.Tensor:
        """Return positions of the slots ``start`` to ``stop`` (stock's ``get_position_ids``).

        In one dimension a ``[gMASK]`` prompt counts straight on; a ``[MASK]`` prompt keeps the mask's position from
        ``<sop>`` on. Stock lost count there while decoding with a cache.

        Returns:
            int64 [B, 2, stop - start] (position, block position), or [B, stop - start] in one dimension.
        """
        slots = torch.arange(start, stop)[None]
        counted = (slots - self.first_slot[:, None]).clamp(min=0)
        in_answer = slots >= self.sop_slot[:, None]
        if not two_dimensional:
            in_answer = in_answer & ~self.has_gmask[:, None]
            return torch.where(in_answer, self.mask_position[:, None], counted)
        position = torch.where(in_answer, self.mask_position[:, None], counted)
        block = (slots - self.sop_slot[:, None] + 1).clamp(min=0)
        return torch.stack((position, block), dim=1)

    def hidden(self, start: int, stop: int) -> torch.Tensor:
        """Return which of the first ``stop`` keys are hidden from rows ``start`` to ``stop`` (stock's ``get_masks``).

        Returns:
            bool [B, 1, stop - start, stop], True where hidden.
        """
        rows, keys = torch.arange(start, stop)[:, None], torch.arange(stop)[None]
        hidden = (keys >= self.sop_slot[:, None, None]) & (keys > rows)
        hidden = hidden | (keys < self.first_slot[:, None, None])
        if self.hidden_slots is not None:
            hidden[:, :, : self.hidden_slots.shape[1]] |= self.hidden_slots[:, None]
        return hidden.unsqueeze(1)


def causal_hidden(past_length: int, length: int, attention_mask: torch.Tensor | None) -> torch.Tensor | None:
    """Return which keys are hidden from ``length`` answer rows after ``past_length`` cached ones.

    Args:
        attention_mask: [B, past_length + length], 0 for padding, or None.

    Returns:
        bool [B or 1, 1, length, past_length + length], True where hidden; None if no key is.

    Raises:
        ValueError: a mask of another length.
    """
    total = past_length + length
    hidden = None
    if length > 1:
        rows, keys = torch.arange(past_length, total)[:, None], torch.arange(total)[None]
        hidden = (keys > rows)[None, None]
    if attention_mask is not None:
        if attention_mask.shape[-1] != total:
            raise ValueError(
                f"attention_mask covers {attention_mask.shape[-1]} tokens, but {past_length} cached and {length} new "
                "ones are attended to; pass one 0 or 1 for each of them."
            )
        padding = ~attention_mask.bool()[:, None, None, :]
        hidden = padding if hidden is None else hidden.to(padding.device) | padding
    return hidden


def cached_tokens(cache: Any, config: ChatGLMConfig) -> int:
    """Return the number of tokens of the sequence in a cache; a P-Tuning prefix does not count."""
    return max(cache.get_seq_length() - (config.pre_seq_len or 0), 0) if cache is not None else 0
