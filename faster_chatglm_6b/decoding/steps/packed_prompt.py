"""Run prompts of several sequences, packed one after the other, and fill the pages of their keys and values."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..numbers import RequestNumbers
from . import prompt
from .decode import DecodeStep

_FIELDS = 4
# Graphs have blocks of attention for so many prompts beside those that the rows fill.
_MOST_PROMPTS = 16
# Kernels see the same alignment whatever the number of rows.
_ALIGNMENT = 16


@dataclass(frozen=True)
class PackedPrompts:
    """Packed prompts on the device.

    Attributes:
        ids: int32 [M].
        sequence, index: int32 [M], as in ``packed_rotary_concat``.
        blocks: int32 [N, 4] as in ``packed_prompt_attention``.
        longest: tokens of the longest prompt that there may be.
        graph_key: what the launches depend on, or None if the prompts have no graph.
    """

    ids: torch.Tensor
    sequence: torch.Tensor
    index: torch.Tensor
    blocks: torch.Tensor
    longest: int
    graph_key: tuple | None


class PackedPromptStep:
    """The buffers of packed prompts and the kernels that fill them: eight launches per layer.

    Rows of all prompts go through the products together, without padding. Only keys and values remain: what follows
    the prompts' last tokens comes from a decode step.

    Args:
        model: a ``ChatGLMForConditionalGeneration`` that ``refusal.check_model`` accepts.
        decode: the step whose pages are filled.
        numbers: of the rows; its ``first_key``, ``sop_slot`` and ``position`` say where the prompts lie.
        most_rows: most tokens of all prompts in one run.
    """

    def __init__(self, model: Any, decode: DecodeStep, numbers: RequestNumbers, most_rows: int):
        self._decode, self._numbers, self.most_rows = decode, numbers, _aligned(most_rows)
        self._buffers = prompt.row_buffers(model.config, self.most_rows, decode.packed)
        self._kernels = kernels = decode.kernels
        self._captured_rows = prompt.most_captured_rows(model) if kernels.CAPTURES else 0
        device = decode.packed.device
        block = kernels.packed_prompt_block(1, device, decode.packed.element_size())
        # Every token may be a prompt of its own.
        words = self.most_rows * (3 + _FIELDS) + _FIELDS * (self.most_rows // block + _MOST_PROMPTS)
        with torch.inference_mode(False):
            self._there = torch.zeros(words, dtype=torch.int32, device=device)

    def place(self, prompts: Sequence[tuple[int, Sequence[int]]]) -> PackedPrompts:
        """Send prompts to the device; the call does not wait.

        Args:
            prompts: of each sequence its row of the block table and its ids, at least one; ``most_rows`` in all.
        """
        lengths = [len(ids) for _, ids in prompts]
        rows = sum(lengths)
        bucket = next((one for one in prompt.LENGTHS if rows <= one <= self._captured_rows), None)
        padded, longest = bucket or rows, bucket or max(lengths)
        if bucket is None and self._kernels.CAPTURES:
            padded = _aligned(rows)
        block = self._kernels.packed_prompt_block(longest, self._there.device, self._decode.packed.element_size())
        blocks = sum(-(-length // block) for length in lengths)
        if bucket is not None:
            most_blocks = bucket // block + _MOST_PROMPTS
            bucket = bucket if blocks <= most_blocks else None
            blocks = max(blocks, most_blocks)
        here = np.zeros(3 * padded + _FIELDS * blocks, dtype=np.int32)
        ids, sequence, index = here[: 3 * padded].reshape(3, padded)
        table = here[3 * padded :].reshape(blocks, _FIELDS)
        sequence[:], table[:, 1] = -1, -1
        row = number = 0
        for place, prompt_ids in prompts:
            length = len(prompt_ids)
            ids[row : row + length], sequence[row : row + length] = prompt_ids, place
            index[row : row + length] = np.arange(length)
            for first in range(0, length, block):
                table[number] = row + first, place, first, length
                number += 1
            row += length
        self._send(here)
        there = self._there[: 3 * padded].view(3, padded)
        table_there = self._there[3 * padded : len(here)].view(blocks, _FIELDS)
        return PackedPrompts(*there, table_there, longest, None if bucket is None else ("packed", padded))

    def _send(self, here: np.ndarray) -> None:
        sent = torch.from_numpy(here)
        sent = sent.pin_memory() if self._there.is_cuda else sent
        self._there[: len(here)].copy_(sent, non_blocking=True)

    def run(self, model: Any, prompts: PackedPrompts) -> None:
        """Fill the pages of all prompts' tokens."""
        decode, numbers, cache, kernels = self._decode, self._numbers, self._decode.cache, self._kernels
        rows = prompts.ids.shape[0]
        hidden, normed, wide = self._buffers
        hidden, normed = hidden[:rows], normed[:rows]
        size = hidden.shape[1]
        packed, context = wide[: rows * 3 * size].view(rows, 3 * size), wide[: rows * size].view(rows, size)
        places = {"prefix": cache.prefix_slots}

        def append(layer: int) -> None:
            rotary = numbers["sop_slot"], numbers["position"], decode.cos, decode.sin
            kernels.packed_rotary_concat(
                packed, *cache.layer(layer), cache.block_table, prompts.sequence, prompts.index, *rotary, **places,
                out=hidden,
            )  # fmt: skip

        def attend(layer: int) -> None:
            kernels.packed_prompt_attention(
                hidden, *cache.layer(layer), cache.block_table, prompts.blocks, numbers["first_key"],
                numbers["sop_slot"], longest=prompts.longest, padded=cache.is_padded, **places,
                out=context,
            )  # fmt: skip

        kernels.embedding(prompts.ids, model.transformer.word_embeddings.weight, out=hidden)
        prompt.run_layers(kernels, model.transformer.layers, (hidden, normed, wide), decode.workspace, append, attend)


def _aligned(rows: int) -> int:
    return -(-rows // _ALIGNMENT) * _ALIGNMENT
