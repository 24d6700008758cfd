"""Run one token of every sequence through the whole network, on preallocated buffers."""

from typing import Any

import torch

from ..network.blocks import RESIDUAL_ALPHA
from ..network.prompt_layout import PromptLayout
from ..ops import triton as kernels
from .kv_cache import KVCache
from .products import normed_product, product


class DecodeStep:
    """The buffers of a decode step and the kernels that fill them: five launches per layer, or fewer.

    Weights are read from the model at every run and never held here, so that the model can free them. A captured graph
    holds their addresses; see ``refusal.check_model``.

    Args:
        model: a ``ChatGLMForConditionalGeneration`` that ``refusal.check_model`` accepts.
        batch: B.
        capacity: most tokens per sequence.
    """

    def __init__(self, model: Any, batch: int, capacity: int):
        config, weight = model.config, model.transformer.word_embeddings.weight
        device, dtype, hidden = weight.device, weight.dtype, config.hidden_size
        heads, head_size = config.num_attention_heads, config.head_size
        self.batch, self.capacity, self.vocab_size = batch, capacity, model.lm_head.weight.shape[0]
        self.cache = KVCache(config.num_layers, batch, heads, capacity, head_size, dtype, device)
        with torch.inference_mode(False):
            # Held here, because the model replaces its table when a longer one is needed.
            self.cos, self.sin = model.transformer.rotary.get(capacity + 2, device, dtype)
            self.workspace = kernels.Workspace(device, batch, heads, head_size, self.vocab_size)
            widths = (hidden, hidden, 3 * hidden, hidden, config.inner_hidden_size, self.vocab_size)
            self._hidden, self._normed, self._packed, self._context, self._inner, self._logits = (
                torch.empty(batch, width, dtype=dtype, device=device) for width in widths
            )
            # Slots of each row's first real token and of its <sop>, and the position of its mask token. Each is a
            # tensor of its own, so that kernels see the same alignment whatever the batch.
            self._first_key, self._sop_index, self._position = (
                torch.zeros(batch, dtype=torch.int32, device=device) for _ in range(3)
            )

    def place(self, layout: PromptLayout, prefix_length: int = 0) -> None:
        """Start with prompts of this layout, after a P-Tuning prefix of ``prefix_length`` keys."""
        self.cache.reset()
        self._first_key.copy_(layout.first_slot)
        self._sop_index.copy_(layout.sop_slot + prefix_length)
        self._position.copy_(layout.mask_position)

    def close_gaps(self, layout: PromptLayout, prefix_length: int) -> None:
        """Copy each row's prefix from the head of the cache over its padding, so that the keys it sees lie together.

        The order of keys does not matter to attention, and those of a prefix carry no position.
        """
        if prefix_length:
            for row, first_slot in enumerate(layout.first_slot.tolist()):
                if first_slot:
                    self.cache.move_head(row, prefix_length, first_slot)

    def run(self, model: Any, tokens: torch.Tensor, length: torch.Tensor, most_keys: int) -> torch.Tensor:
        """Feed one token per sequence after ``length`` cached ones.

        Args:
            tokens: int64 [B].
            length: int32 [1]; the new keys go to this slot.
            most_keys: most keys that there will be. It only decides how attention is split: any number is right.

        Returns:
            Logits [B, V], a buffer that the next run overwrites.
        """
        network, workspace = model.transformer, self.workspace
        # Inside a graph only the projection is written while attention waits, so everything else may be read early.
        # Eager steps may overlap the previous step, so there it may not.
        stable_state = tokens.is_cuda and torch.cuda.is_current_stream_capturing()
        hidden, normed = self._hidden, self._normed
        kernels.embedding(tokens, network.word_embeddings.weight, out=hidden)
        for index, layer in enumerate(network.layers):
            attention, mlp = layer.attention, layer.mlp
            self._normed_product(layer.input_layernorm, attention.query_key_value, self._packed)
            kernels.decode_attention(
                self._packed,
                *self.cache.layer(index),
                length,
                self._first_key,
                self._position,
                self._sop_index,
                self.cos,
                self.sin,
                max_length=most_keys,
                stable_state=stable_state,
                workspace=workspace,
                out=self._context,
            )
            product(attention.dense, self._context, normed, RESIDUAL_ALPHA, hidden, workspace)
            self._normed_product(layer.post_attention_layernorm, mlp.dense_h_to_4h, self._inner, gelu=True)
            product(mlp.dense_4h_to_h, self._inner, normed, RESIDUAL_ALPHA, hidden, workspace)
        self._normed_product(network.final_layernorm, model.lm_head, self._logits)
        return self._logits

    def _normed_product(self, norm: Any, linear: Any, out: torch.Tensor, gelu: bool = False) -> None:
        """Compute out = linear(norm(hidden)), and keep the normalised rows for the residual after it."""
        normed_product(norm, linear, self._hidden, gelu, self._normed, out, self.workspace)
