"""Run several positions of every sequence through the whole network: a token and the ids drafted after it."""

from typing import Any

import torch

from ...network.blocks import RESIDUAL_ALPHA
from ..numbers import RequestNumbers
from .decode import DecodeStep
from .products import product


class DraftStep(DecodeStep):
    """A decode step of R positions for each sequence, on buffers of its own and the cache of another step.

    Args:
        model: as of ``DecodeStep``.
        step: the step of one token, whose cache and tables are used.
        positions: R, from 1 to 16.
        numbers: of the request; one for each sequence.
        limit: int32 [B], the slots of each sequence, if its cache lies in pages.
    """

    def __init__(
        self,
        model: Any,
        step: DecodeStep,
        positions: int,
        numbers: RequestNumbers,
        limit: torch.Tensor | None = None,
    ):
        config, like = model.config, step.packed
        hidden, heads = config.hidden_size, config.num_attention_heads
        self.kernels = step.kernels
        self._numbers, self._sequences, self.positions = numbers, step.batch, positions
        self._limit = limit
        self.batch, self.capacity, self.vocab_size = step.batch * positions, step.capacity, step.vocab_size
        self.cache, self.cos, self.sin = step.cache, step.cos, step.sin
        with torch.inference_mode(False):
            self.workspace = self.kernels.Workspace(like.device, self.batch, heads, config.head_size, self.vocab_size)
            widths = (hidden, hidden, 3 * hidden, hidden, config.inner_hidden_size, self.vocab_size)
            self._hidden, self.normed, self.packed, self._context, self._inner, self.logits = (
                torch.empty(self.batch, width, dtype=like.dtype, device=like.device) for width in widths
            )

    def narrowed(self, batch: int) -> "DraftStep":
        """Return a step of the first ``batch`` sequences, on the same memory."""
        step = super().narrowed(batch * self.positions)
        step._sequences = batch
        return step

    def run(self, model: Any, tokens: torch.Tensor, length: torch.Tensor, most_keys: int) -> torch.Tensor:
        """Feed R tokens per sequence after ``length`` cached ones.

        Args:
            tokens: int64 [B, R].
            length: int32 [B]; the new keys go to the slots from there on.
            most_keys: as of ``DecodeStep.run``.

        Returns:
            Logits [B * R, V], a buffer that the next run overwrites.
        """
        return super().run(model, tokens.view(-1), length, most_keys)

    def finish_layer(
        self, index: int, layer: Any, length: torch.Tensor, most_keys: int, stable_state: bool = False
    ) -> None:
        """Run what follows the packed projection in a layer; arguments as of ``DecodeStep.finish_layer``."""
        attention, mlp, workspace, numbers = layer.attention, layer.mlp, self.workspace, self._numbers
        self.kernels.draft_attention(
            self.packed.view(self._sequences, self.positions, -1),
            *self.cache.layer(index),
            length,
            numbers["finished"],
            numbers["first_key"],
            numbers["position"],
            numbers["sop_index"],
            self.cos,
            self.sin,
            block_table=self.cache.block_table,
            limit=self._limit,
            padded=self.cache.is_padded,
            max_length=most_keys,
            stable_state=stable_state,
            workspace=workspace,
            out=self._context.view(self._sequences, self.positions, -1),
        )
        product(self.kernels, attention.dense, self._context, self._hidden, workspace, self.normed, RESIDUAL_ALPHA)
        self._normed_product(layer.post_attention_layernorm, mlp.dense_h_to_4h, self._inner, gelu=True)
        product(self.kernels, mlp.dense_4h_to_h, self._inner, self._hidden, workspace, self.normed, RESIDUAL_ALPHA)
