"""Prompts of several sequences, packed one after the other, on caches that lie in pages."""

import torch

from . import places
from .kernel import kernel
from .prompt import attend

# Every prompt is a block of its own.
_BLOCK = 1 << 30


def packed_prompt_block(longest: int, device: torch.device, element_size: int) -> int:
    """Return the rows of a block of queries for prompts of up to ``longest`` tokens."""
    return _BLOCK


def packed_rotary_concat(
    qkv: torch.Tensor,
    key_pages: torch.Tensor,
    value_pages: torch.Tensor,
    block_table: torch.Tensor,
    sequence: torch.Tensor,
    index: torch.Tensor,
    sop_slot: torch.Tensor,
    position: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *,
    prefix: int = 0,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Rotate queries and keys of packed prompts; return the queries, and write keys and values to pages.

    Arguments and meaning are those of ``triton.packed_rotary_concat``.
    """
    rows, (_, heads, page, width) = qkv.shape[0], key_pages.shape
    out = qkv.new_empty(rows, heads * width) if out is None else out
    sequence, index = sequence[:rows], index[:rows]
    slot, place = (prefix + index).long(), sequence.clamp(min=0).long()
    real = (sequence >= 0) & (slot < block_table.shape[1] * page)
    pages = block_table[place, (slot // page).clamp(max=block_table.shape[1] - 1)].long()
    offsets = torch.where(real, pages * key_pages.stride(0) + slot % page * key_pages.stride(2), -1)
    sop = sop_slot[place]
    turns = torch.where(index < sop, index, position[place]).int(), (index - sop + 1).clamp(min=0).int()
    places.run(kernel(), qkv, out, key_pages, value_pages, offsets, *turns, cos, sin)
    return out


def packed_prompt_attention(
    query: torch.Tensor,
    key_pages: torch.Tensor,
    value_pages: torch.Tensor,
    block_table: torch.Tensor,
    blocks: torch.Tensor,
    first_key: torch.Tensor,
    sop_slot: torch.Tensor,
    *,
    longest: int,
    prefix: int = 0,
    padded: bool = False,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attend from the rows of packed prompts to the keys of their sequences.

    Arguments and meaning are those of ``triton.packed_prompt_attention``; a block is a whole prompt.
    """
    out = torch.empty_like(query) if out is None else out
    page = key_pages.shape[2]
    for row, sequence, _, length in blocks.tolist():
        if sequence < 0:
            continue
        first, end = int(first_key[sequence]), prefix + length
        pages = block_table[sequence, : -(-end // page)]
        # [pages, H, S, K] to [H, slots, K], as contiguous caches are.
        keys, values = (
            cache.index_select(0, pages).transpose(0, 1).flatten(1, 2)[:, first:end]
            for cache in (key_pages, value_pages)
        )
        mine = slice(row, row + length)
        attend(query[mine], keys, values, int(sop_slot[sequence]), prefix - first, out[mine])
    return out
