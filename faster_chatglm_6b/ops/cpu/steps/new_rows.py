"""A step's new rows of each sequence: their positions, the append to the cache, and attention."""

import ctypes
import math
from typing import NamedTuple

import torch

from .. import native
from .places import rotated


class Step(NamedTuple):
    """The arguments of ``draft_attention``, in its words; ``qkv`` and ``out`` are [B, R, ...]."""

    qkv: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    length: torch.Tensor
    finished: torch.Tensor
    first_key: torch.Tensor
    position: torch.Tensor
    sop_index: torch.Tensor
    cos: torch.Tensor
    sin: torch.Tensor
    block_table: torch.Tensor | None
    limit: torch.Tensor | None
    out: torch.Tensor

    @property
    def page(self) -> int:
        """Slots of a page, or of a sequence's own cache."""
        return self.keys.shape[2]

    @property
    def capacity(self) -> int:
        """Slots of a sequence."""
        return self.page if self.block_table is None else self.block_table.shape[1] * self.page


def run(compiled: native.Kernel | None, step: Step) -> None:
    """Compute a step with the compiled kernel, or with PyTorch if that is None or does not know the dtype.

    Raises:
        MemoryError: there is no memory for the scores.
    """
    kind = native.KINDS.get(step.qkv.dtype)
    if compiled is None or kind is None or step.cos.dtype != step.qkv.dtype:
        _run_in_torch(step)
        return
    (batch, rows, _), (_, heads, page, width) = step.qkv.shape, step.keys.shape
    table = step.block_table
    pages = 0 if table is None else table.shape[1]
    sizes = pages, page, *step.cos.shape, batch, rows, heads, width, step.capacity
    failed = compiled.library.step_attention(
        step.qkv.data_ptr(),
        kind,
        step.keys.data_ptr(),
        step.values.data_ptr(),
        (ctypes.c_long * 3)(*step.keys.stride()[:3]),
        None if table is None else table.data_ptr(),
        None if step.limit is None else step.limit.data_ptr(),
        *(tensor.data_ptr() for tensor in step[3:10]),
        step.out.data_ptr(),
        (ctypes.c_long * len(sizes))(*sizes),
        1.0 / math.sqrt(width),
        torch.get_num_threads(),
    )
    if failed:
        raise MemoryError(f"There is no memory for the scores of {batch} sequences.")


def _run_in_torch(step: Step) -> None:
    (batch, rows, _), (_, heads, _, width) = step.qkv.shape, step.keys.shape
    lengths, done, first_keys = (tensor.tolist() for tensor in step[3:6])
    last, row = len(step.cos) - 1, torch.arange(rows, device="cpu")
    visible = row[None] <= row[:, None]
    for b in range(batch):
        end = lengths[b]
        first = step.position[b].long().clamp(0, last).expand(rows)
        second = (end + row - step.sop_index[b] + 1).long().clamp(0, last)
        query, key, value = step.qkv[b].view(rows, heads, 3, width).unbind(2)
        query, key = (rotated(one, first, second, step.cos, step.sin).to(value.dtype) for one in (query, key))
        held: list[tuple[torch.Tensor, ...]] = [(), ()]
        if not done[b]:
            bound = step.capacity if step.limit is None else min(int(step.limit[b]), step.capacity)
            for m in range(min(rows, bound - end)):
                block, slot = _place(step, b, end + m)
                step.keys[block, :, slot], step.values[block, :, slot] = key[m], value[m]
            places = [_place(step, b, t) for t in range(first_keys[b], end)]
            if places:
                blocks, slots = torch.tensor(places, dtype=torch.int64, device="cpu").T
                held = [(cache[blocks, :, slots],) for cache in (step.keys, step.values)]
        keys, values = (torch.cat((*old, new)) for old, new in zip(held, (key, value), strict=True))
        scores = torch.einsum("mhk,thk->hmt", query.float(), keys.float()) / math.sqrt(width)
        hidden = torch.cat((torch.zeros(rows, len(keys) - rows, dtype=torch.bool, device="cpu"), ~visible), dim=1)
        weights = scores.masked_fill(hidden, -math.inf).softmax(-1)
        step.out[b] = torch.einsum("hmt,thk->mhk", weights, values.float()).reshape(rows, -1).to(step.out.dtype)


def _place(step: Step, sequence: int, slot: int) -> tuple[int, int]:
    """Return the sequence's own cache, or the page, that holds a slot, and the slot's place there."""
    if step.block_table is None:
        return sequence, slot
    return int(step.block_table[sequence, slot // step.page]), slot % step.page
