"""Offer attributes and methods of the checkpoint's own code that users' scripts read; nothing here calls them.

All follow from the configuration: they hold no state and add nothing to a ``state_dict``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch


def _configured(name: str, doc: str) -> property:
    return property(lambda self: getattr(self.config, name), doc=doc)


class StockModelNames:
    """Names of both models: stock's ``ChatGLMPreTrainedModel``, and what both set in ``__init__``."""

    is_parallelizable = False

    max_sequence_length = _configured("max_sequence_length", "Longest prompt in training, in tokens.")
    position_encoding_2d = _configured("position_encoding_2d", "Whether positions have two axes.")

    def get_masks(self, input_ids: torch.Tensor, device: Any = None) -> torch.Tensor:
        """Return stock's mask, which knows no padding, of ids int64 [B, L].

        Args:
            device: of the result; the device of the ids by default.

        Returns:
            bool [B, 1, L, L], True where hidden.

        Raises:
            ValueError: a row without <sop>.
        """
        slots = torch.arange(input_ids.shape[1])
        context = self._context_lengths(input_ids)[:, None, None]
        hidden = (slots[None, None] > slots[None, :, None]) & (slots[None, None] >= context)
        return hidden.unsqueeze(1).to(input_ids.device if device is None else device)

    def get_position_ids(
        self,
        input_ids: torch.Tensor,
        mask_positions: Sequence[int] | torch.Tensor | int,
        device: Any = None,
        use_gmasks: Sequence[bool] | bool | None = None,
    ) -> torch.Tensor:
        """Return stock's positions, which know no padding, of ids int64 [B, L].

        Args:
            mask_positions: slot of each row's [gMASK] or [MASK], whose position the answer keeps. The code of March
                2023 passes one for all rows.
            device: of the result; the device of the ids by default.
            use_gmasks: rows that count straight on, in one dimension only.

        Returns:
            int64 [B, 2, L] (position, block position), or [B, L] in one dimension.

        Raises:
            ValueError: a row without <sop>.
        """
        slots = torch.arange(input_ids.shape[1])[None]
        context = self._context_lengths(input_ids)[:, None]
        batch = input_ids.shape[0]
        kept = torch.as_tensor(mask_positions).cpu().reshape(-1, 1).expand(batch, 1)
        answer = slots >= context
        if self.position_encoding_2d:
            block = (slots - context + 1).clamp(min=0)
            positions = torch.stack((torch.where(answer, kept, slots.expand(batch, -1)), block), dim=1)
        else:
            straight = torch.as_tensor(False if use_gmasks is None else use_gmasks).cpu().reshape(-1, 1)
            positions = torch.where(answer & ~straight, kept, slots.expand(batch, -1))
        return positions.to(input_ids.device if device is None else device)

    def _context_lengths(self, input_ids: torch.Tensor) -> torch.Tensor:
        is_sop = input_ids.cpu() == self.config.bos_token_id
        if not bool(is_sop.any(dim=1).all()):
            raise ValueError(
                f"input_ids hold no <sop> ({self.config.bos_token_id}), which ends the context; make the ids with the "
                "checkpoint's tokenizer."
            )
        return is_sop.int().argmax(dim=1)


class StockGenerationNames:
    """Names of ``ChatGLMForConditionalGeneration``."""

    @property
    def quantized(self) -> bool:
        """Whether the linear layers hold integers."""
        return bool(self.config.quantization_bit)


class StockNetworkNames:
    """Names of ``ChatGLMModel``."""

    params_dtype = getattr(torch, "float16", None)

    hidden_size = _configured("hidden_size", "Width of the residual stream.")
    inner_hidden_size = _configured("inner_hidden_size", "Width of the MLP.")
    num_layers = _configured("num_layers", "Number of layers.")
    num_attention_heads = _configured("num_attention_heads", "Heads of a layer.")
    hidden_size_per_attention_head = _configured("head_size", "Width of a head.")
    vocab_size = _configured("vocab_size", "Rows of the embedding.")
    layernorm_epsilon = _configured("layernorm_epsilon", "Epsilon of every LayerNorm.")
    pre_seq_len = _configured("pre_seq_len", "Virtual tokens of P-Tuning, or None.")
    prefix_projection = _configured("prefix_projection", "Whether the P-Tuning prefix goes through an MLP.")

    @property
    def prefix_tokens(self) -> torch.Tensor:
        """The virtual tokens of P-Tuning, int64 [pre_seq_len]; no such attribute without a prefix."""
        if not self.config.pre_seq_len:
            raise AttributeError("prefix_tokens")
        return torch.arange(self.config.pre_seq_len)

    def get_prompt(
        self, batch_size: int, device: Any = None, dtype: torch.dtype | None = params_dtype
    ) -> tuple[torch.Tensor, ...]:
        """Return each layer's P-Tuning prefix as stock does, [2 (key, value), pre_seq_len, batch, heads, head size].

        Raises:
            ValueError: the model has no prefix.
        """
        if not self.config.pre_seq_len:
            raise ValueError("get_prompt() needs a P-Tuning prefix, but config.pre_seq_len is not set; set it at load.")
        prefix = self.prefix_encoder.keys_and_values(batch_size, dtype)
        return tuple(torch.stack(pair).permute(0, 3, 1, 2, 4).to(device or pair[0].device) for pair in prefix)


class StockAttentionNames:
    """Names of ``SelfAttention``; heads are never split over devices."""

    @property
    def hidden_size(self) -> int:
        """Width of the residual stream."""
        return self.num_attention_heads * self.head_size

    @property
    def hidden_size_per_attention_head(self) -> int:
        """Width of a head."""
        return self.head_size

    @property
    def num_attention_heads_per_partition(self) -> int:
        """As ``num_attention_heads``."""
        return self.num_attention_heads

    @property
    def hidden_size_per_partition(self) -> int:
        """As ``hidden_size``."""
        return self.hidden_size
