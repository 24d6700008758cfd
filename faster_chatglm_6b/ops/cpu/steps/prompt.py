"""Prompts of several sequences, padded on the left, on contiguous caches."""

import torch
from torch.nn import functional

from . import places
from .kernel import kernel


def rotary_concat_past_key_value(
    qkv: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    first_slot: torch.Tensor,
    sop_slot: torch.Tensor,
    position: torch.Tensor,
    last_row: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *,
    prefix: int = 0,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Rotate queries and keys of left-padded prompts; return the queries, and write keys and values to the cache.

    Arguments and meaning are those of ``triton.rotary_concat_past_key_value``.
    """
    (batch, rows, _), (_, heads, capacity, width) = qkv.shape, key_cache.shape
    out = qkv.new_empty(batch, rows, heads * width) if out is None else out
    row = torch.arange(rows, dtype=torch.int32, device="cpu")[None]
    first, sop = first_slot[:batch, None], sop_slot[:batch, None]
    real = (row >= first) & (row <= last_row) & (prefix + row < capacity)
    sequence = torch.arange(batch, device="cpu")[:, None] * key_cache.stride(0)
    offsets = torch.where(real, sequence + (prefix + row).long() * key_cache.stride(2), -1)
    turns = torch.where(row < sop, row - first, position[:batch, None]), (row - sop + 1).clamp(min=0)
    turns = (turn.expand(batch, rows).int().reshape(-1) for turn in turns)
    flat, query = qkv.view(batch * rows, -1), out.view(batch * rows, -1)
    places.run(kernel(), flat, query, key_cache, value_cache, offsets.view(-1), *turns, cos, sin)
    return out


def prompt_attention(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    first_slot: torch.Tensor,
    sop_slot: torch.Tensor,
    last_row: torch.Tensor,
    *,
    prefix: int = 0,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attend from the rows of left-padded prompts to the keys in the cache.

    Arguments and meaning are those of ``triton.prompt_attention``.
    """
    out = torch.empty_like(query) if out is None else out
    end = min(int(last_row) + 1, query.shape[1])
    for b, (first, sop) in enumerate(zip(first_slot.tolist(), sop_slot.tolist(), strict=False)):
        if b == len(query):
            break
        keys, values = (cache[b, :, first : prefix + end] for cache in (key_cache, value_cache))
        # The row ``first`` and the key in its slot, after the prefix, come first.
        attend(query[b, first:end], keys, values, max(sop - first, 0), prefix, out[b, first:end])
    return out


def attend(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, context: int, prefix: int, out: torch.Tensor
) -> None:
    """Attend from all rows of one prompt: to the prefix and the context, and to other rows up to the own one.

    Args:
        query: [M, H * K]. keys, values: [H, prefix + M, K]. out: [M, H * K].
        context: rows that all rows see.
    """
    rows, (heads, count, width) = query.shape[0], keys.shape
    queries, target = (tensor.view(rows, heads, width).transpose(0, 1) for tensor in (query, out))
    context = min(context, rows)
    for start, stop, seen in ((0, context, prefix + context), (context, rows, count)):
        if start == stop:
            continue
        mask = None
        # Rows behind the context see each other from one side.
        if start == context and stop - start > 1:
            row, key = torch.arange(start, stop, device="cpu"), torch.arange(seen, device="cpu")
            mask = (key < prefix + context)[None] | (key[None] <= prefix + row[:, None])
        one = (tensor[None, :, :seen] for tensor in (keys, values))
        target[:, start:stop] = functional.scaled_dot_product_attention(queries[None, :, start:stop], *one, mask)[0]
