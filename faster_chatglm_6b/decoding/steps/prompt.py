"""Run a batch of prompts through the whole network and fill the cache, up to the logits of their last rows."""

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch

from ...configuration_chatglm import ChatGLMConfig
from ...layers.quantized import QuantizedLinear
from ...network.blocks import RESIDUAL_ALPHA
from ...network.prompt_layout import PromptLayout
from ...ops.steps import step_kernels
from ..numbers import RequestNumbers
from .decode import DecodeStep
from .products import product

# Prompts of up to so many rows in all have a captured graph for each length in this list, and longer ones none: their
# kernels take longer than their launches. Integer weights are dequantised for more rows than the second number, and a
# graph would keep the memory for that.
MOST_CAPTURED_ROWS, MOST_INTEGER_ROWS = 512, 256
LENGTHS = (16, 32, *range(64, MOST_CAPTURED_ROWS + 1, 64))


def captured_length(batch: int, length: int, most_rows: int) -> int | None:
    """Return the rows per sequence of the graph for prompts of ``length`` tokens, or None if they have none.

    Every graph takes time to capture and the place of another one, so lengths between those of the list have none.
    """
    return next((rows for rows in LENGTHS if length <= rows <= most_rows // batch), None)


class PromptStep:
    """The buffers of a prompt's rows and the kernels that fill them: eight launches per layer.

    Only the last row of a sequence matters after the last layer's keys and values, so it goes on as a decode step does.
    Where the prompts lie is read from device memory. So one graph serves every length up to its own.

    Args:
        model: a ``ChatGLMForConditionalGeneration`` that ``refusal.check_model`` accepts.
        decode: the step whose cache is filled.
        numbers: of the request.
    """

    def __init__(self, model: Any, decode: DecodeStep, numbers: RequestNumbers):
        config, device = model.config, decode.packed.device
        self._decode, self._numbers = decode, numbers
        self._prefix, self._config = config.pre_seq_len or 0, config
        self._captured: tuple[torch.Tensor, ...] | None = None
        self._kernels = step_kernels(device)
        self._most_rows = most_captured_rows(model) if self._kernels.CAPTURES else 0
        with torch.inference_mode(False):
            self._ids = torch.zeros(MOST_CAPTURED_ROWS, dtype=torch.int64, device=device)

    def place(self, model: Any, input_ids: torch.Tensor, layout: PromptLayout) -> tuple[torch.Tensor, bool]:
        """Set where these prompts lie, and put a P-Tuning prefix into the cache.

        Args:
            input_ids: int64 [B, L].

        Returns:
            The ids for ``run``, int64 [B, M], and whether such prompts have a graph: the ids are then padded on the
            right, in a buffer.
        """
        batch, length = input_ids.shape
        decode = self._decode
        decode.place(layout, self._prefix)
        self._numbers.set(sop_slot=layout.sop_slot.numpy(), last_row=length - 1)
        if self._prefix:
            keys_and_values = model.transformer.prefix_encoder.packed(decode.packed.dtype)
            decode.cache.place_prefix(keys_and_values, layout.first_slot.tolist())
        rows = self.graph_rows(batch, length)
        if rows is None:
            return input_ids, False
        ids = self._ids[: batch * rows].view(batch, rows)
        ids[:, :length].copy_(input_ids)
        return ids, True

    def graph_rows(self, batch: int, length: int) -> int | None:
        """Return the rows per sequence of the graph for prompts of ``length`` tokens, or None if they have none."""
        return captured_length(batch, length, self._most_rows)

    def run(self, model: Any, ids: torch.Tensor, cache_length: torch.Tensor, most_keys: int) -> torch.Tensor:
        """Feed the prompts, whose last row takes the slot ``cache_length``.

        Args:
            ids: int64 [B, M] from ``place``.
            cache_length: int32, one for each row of the decode step: at least B.
            most_keys: as of ``DecodeStep.run``.

        Returns:
            Logits of all rows of the decode step; those of the prompts come first. The next run overwrites them.
        """
        (batch, rows), decode, network, kernels = ids.shape, self._decode, model.transformer, self._kernels
        hidden, normed, wide = self._buffers(batch * rows)
        size, workspace = hidden.shape[1], decode.workspace
        packed = wide[: batch * rows * 3 * size].view(batch, rows, 3 * size)
        query, context = hidden.view(batch, rows, size), wide[: batch * rows * size].view(batch, rows, size)
        place, last_row = (self._numbers["first_key"], self._numbers["sop_slot"]), self._numbers["last_row"]

        def append(layer: int) -> None:
            cache = [tensor[:batch] for tensor in decode.cache.layer(layer)]
            tables = self._numbers["position"], last_row, decode.cos, decode.sin
            kernels.rotary_concat_past_key_value(packed, *cache, *place, *tables, prefix=self._prefix, out=query)

        def attend(layer: int) -> None:
            cache = [tensor[:batch] for tensor in decode.cache.layer(layer)]
            kernels.prompt_attention(query, *cache, *place, last_row, prefix=self._prefix, out=context)

        kernels.embedding(ids.reshape(-1), network.word_embeddings.weight, out=hidden)
        run_layers(kernels, network.layers, (hidden, normed, wide), workspace, append, attend)
        for source, target in ((packed, decode.packed), (normed.view(batch, rows, size), decode.normed)):
            torch.index_select(source, 1, last_row, out=target[:batch, None])
        decode.finish_layer(len(network.layers) - 1, network.layers[-1], cache_length, most_keys)
        return decode.finish(model)

    def _buffers(self, rows: int) -> tuple[torch.Tensor, ...]:
        """Return memory for ``rows`` rows in all: two buffers [rows, hidden], and one for the wider products."""
        if rows > MOST_CAPTURED_ROWS:
            return row_buffers(self._config, rows, self._decode.packed)
        if self._captured is None:
            self._captured = row_buffers(self._config, MOST_CAPTURED_ROWS, self._decode.packed)
        hidden, normed, wide = self._captured
        return hidden[:rows], normed[:rows], wide


def row_buffers(config: ChatGLMConfig, rows: int, like: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Return memory for ``run_layers``: two buffers [rows, hidden], and one for the wider products of all rows."""
    wide = max(config.inner_hidden_size, 3 * config.hidden_size)
    with torch.inference_mode(False):
        shapes = (rows, config.hidden_size), (rows, config.hidden_size), (rows * wide,)
        return tuple(torch.empty(shape, dtype=like.dtype, device=like.device) for shape in shapes)


def most_captured_rows(model: Any) -> int:
    """Return the most rows of prompts for which a graph is worth its memory; see ``MOST_INTEGER_ROWS``."""
    is_integer = any(type(module) is QuantizedLinear for module in model.modules())
    return min(MOST_CAPTURED_ROWS, MOST_INTEGER_ROWS) if is_integer else MOST_CAPTURED_ROWS


def run_layers(
    kernels: ModuleType,
    layers: Sequence[Any],
    buffers: tuple[torch.Tensor, ...],
    workspace: Any,
    append: Callable[[int], None],
    attend: Callable[[int], None],
) -> None:
    """Run the rows of prompts through all layers, up to the keys and values of the last one.

    Args:
        kernels: from ``step_kernels``.
        buffers: from ``row_buffers``. The first one holds the embedded rows [M, hidden]. In a layer the projection
            [M, 3 * hidden] stands at the start of the third one and the rotated queries [M, hidden] in the first, then
            the attention's result [M, hidden] at the start of the third one. At the end the projection of the last
            layer and, in the second one, its normalised input are there.
        append: rotates queries and keys of a layer's projection, and writes keys and values to the cache.
        attend: attends from the queries of a layer.
    """
    hidden, normed, wide = buffers
    rows, size = hidden.shape
    packed, context = wide[: rows * 3 * size].view(rows, 3 * size), wide[: rows * size].view(rows, size)
    for index, layer in enumerate(layers):
        attention, mlp = layer.attention, layer.mlp
        # The residual of the layer before is added here.
        _normalise(kernels, layer.input_layernorm, hidden, normed if index else None, normed)
        product(kernels, attention.query_key_value, normed, packed, workspace)
        append(index)
        if index == len(layers) - 1:
            return
        attend(index)
        # The projection is no longer needed once the queries are rotated.
        product(kernels, attention.dense, context, hidden, workspace)
        _normalise(kernels, layer.post_attention_layernorm, hidden, normed, normed)
        inner = wide[: rows * mlp.dense_h_to_4h.out_features].view(rows, -1)
        product(kernels, mlp.dense_h_to_4h, normed, inner, workspace, gelu=True)
        product(kernels, mlp.dense_4h_to_h, inner, hidden, workspace)


def _normalise(
    kernels: ModuleType, norm: Any, x: torch.Tensor, residual: torch.Tensor | None, out: torch.Tensor
) -> None:
    """Compute out = norm(x + RESIDUAL_ALPHA * residual); ``out`` may be ``residual``."""
    kernels.skip_layer_norm(x, norm.weight, norm.bias, residual, norm.eps, RESIDUAL_ALPHA, out=out)
