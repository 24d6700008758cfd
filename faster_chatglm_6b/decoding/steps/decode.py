"""Run one token of every sequence through the whole network, on preallocated buffers."""

import copy
from typing import Any

import torch

from ...network.blocks import RESIDUAL_ALPHA
from ...network.prompt_layout import PromptLayout
from ...ops import operators_for
from ...ops.steps import step_kernels
from ..numbers import RequestNumbers
from .kv_cache import KVCache, PagedKVCache
from .products import normed_product, product


class DecodeStep:
    """The buffers of a decode step and the kernels that fill them: five launches per layer, or fewer.

    Weights are read from the model at every run and never held here, so that the model can free them. A captured graph
    holds their addresses; see ``refusal.check_model``.

    Args:
        model: a ``ChatGLMForConditionalGeneration`` that ``refusal.check_model`` accepts.
        batch: B.
        capacity: most tokens per sequence.
        numbers: of the request, or of the rows.
        cache: of ``capacity`` tokens per sequence; a contiguous one is made if it is left out.
    """

    def __init__(
        self, model: Any, batch: int, capacity: int, numbers: RequestNumbers, cache: PagedKVCache | None = None
    ):
        config, weight = model.config, model.transformer.word_embeddings.weight
        device, dtype, hidden = weight.device, weight.dtype, config.hidden_size
        heads, head_size = config.num_attention_heads, config.head_size
        self.kernels = kernels = step_kernels(device)
        if not kernels.CAPTURES:
            # These products are the operators' own, and status() lists the ones that were chosen.
            operators_for(device, dtype, head_size, differentiable=False)
        self._numbers = numbers
        self.batch, self.capacity, self.vocab_size = batch, capacity, model.lm_head.weight.shape[0]
        self.cache = cache or KVCache(config.num_layers, batch, heads, capacity, head_size, dtype, device)
        with torch.inference_mode(False):
            # Held here, because the model replaces its table when a longer one is needed.
            self.cos, self.sin = model.transformer.rotary.get(capacity + 2, device, dtype)
            self.workspace = kernels.Workspace(device, batch, heads, head_size, self.vocab_size)
            widths = (hidden, hidden, 3 * hidden, hidden, config.inner_hidden_size, self.vocab_size)
            self._hidden, self.normed, self.packed, self._context, self._inner, self.logits = (
                torch.empty(batch, width, dtype=dtype, device=device) for width in widths
            )

    def narrowed(self, batch: int) -> "DecodeStep":
        """Return a step of the first ``batch`` rows, on the same memory."""
        step = copy.copy(self)
        step.batch = batch
        for name in ("_hidden", "normed", "packed", "_context", "_inner", "logits"):
            setattr(step, name, getattr(self, name)[:batch])
        return step

    def place(self, layout: PromptLayout, prefix_length: int = 0) -> None:
        """Set where prompts of this layout lie, after a P-Tuning prefix of ``prefix_length`` keys."""
        first_slot, sop_slot = layout.first_slot.numpy(), layout.sop_slot.numpy()
        self._numbers.set(
            first_key=first_slot, sop_index=sop_slot + prefix_length, position=layout.mask_position.numpy()
        )

    def run(self, model: Any, tokens: torch.Tensor, length: torch.Tensor, most_keys: int) -> torch.Tensor:
        """Feed one token per sequence after ``length`` cached ones.

        Args:
            tokens: int64 [B].
            length: int32 [B]; the new keys go to these slots.
            most_keys: most keys that there will be. It only decides how attention is split: any number is right.

        Returns:
            Logits [B, V], a buffer that the next run overwrites.
        """
        network = model.transformer
        # Inside a graph only the projection is written while attention waits, so everything else may be read early.
        # Eager steps may overlap the previous step, so there it may not.
        stable_state = tokens.is_cuda and torch.cuda.is_current_stream_capturing()
        self.kernels.embedding(tokens, network.word_embeddings.weight, out=self._hidden)
        for index, layer in enumerate(network.layers):
            self._normed_product(layer.input_layernorm, layer.attention.query_key_value, self.packed)
            self.finish_layer(index, layer, length, most_keys, stable_state)
        return self.finish(model)

    def finish_layer(
        self, index: int, layer: Any, length: torch.Tensor, most_keys: int, stable_state: bool = False
    ) -> None:
        """Run what follows the packed projection in a layer, from ``packed`` and ``normed``; arguments as of ``run``.

        Args:
            stable_state: whether nothing that may still run writes what attention reads, but for the projection.
        """
        attention, mlp, workspace, numbers = layer.attention, layer.mlp, self.workspace, self._numbers
        self.kernels.decode_attention(
            self.packed,
            *self.cache.layer(index),
            length,
            numbers["finished"],
            numbers["first_key"],
            numbers["position"],
            numbers["sop_index"],
            self.cos,
            self.sin,
            block_table=self.cache.block_table,
            padded=self.cache.is_padded,
            max_length=most_keys,
            stable_state=stable_state,
            workspace=workspace,
            out=self._context,
        )
        product(self.kernels, attention.dense, self._context, self._hidden, workspace, self.normed, RESIDUAL_ALPHA)
        self._normed_product(layer.post_attention_layernorm, mlp.dense_h_to_4h, self._inner, gelu=True)
        product(self.kernels, mlp.dense_4h_to_h, self._inner, self._hidden, workspace, self.normed, RESIDUAL_ALPHA)

    def finish(self, model: Any) -> torch.Tensor:
        """Run what follows the last layer, and return the logits [B, V]."""
        self._normed_product(model.transformer.final_layernorm, model.lm_head, self.logits)
        return self.logits

    def _normed_product(self, norm: Any, linear: Any, out: torch.Tensor, gelu: bool = False) -> None:
        """Compute out = linear(norm(hidden)), and keep the normalised rows for the residual after it."""
        normed_product(self.kernels, norm, linear, self._hidden, gelu, self.normed, out, self.workspace)
