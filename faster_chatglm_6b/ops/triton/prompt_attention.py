"""Attention of a prompt's rows against the cache: every row sees the whole context (Flash-Attention, Dao et al. 2022).

Serve ``fused_multi_head_attention_inference_v2`` in the captured loop's prompt step.
"""

import math

import torch
import triton
import triton.language as tl

from .common import pdl_options, require, require_equal_caches, wait_for_predecessor
from .configs import family, prompt_attention_config, uses_pdl


@triton.jit
def load_tile(source, start, slots, columns, lowest, stop, stride_t, K: tl.constexpr, MASKED: tl.constexpr):
    """Load the rows [start, start + BLOCK_T) of keys or values; if MASKED, those outside of [lowest, stop) as 0."""
    slot = (start + slots)[:, None]
    pointers = source + slot.to(tl.int64) * stride_t + columns[None, :]
    if MASKED:
        tile = tl.load(pointers, mask=(slot >= lowest) & (slot < stop) & (columns < K)[None, :], other=0.0)
    elif columns.shape[0] == K:
        tile = tl.load(pointers)
    else:
        tile = tl.load(pointers, mask=(columns < K)[None, :], other=0.0)
    return tile


@triton.jit
def attend(
    highest, total, acc, q, keys, values, start, lowest, stop, context, last_key, slots, columns, stride_t, scale,
    K: tl.constexpr, PRECISION: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Add the tile of keys from ``start`` on to the running softmax, whose exponents are powers of two.

    MASKED: a row sees the keys below ``context``, those up to its ``last_key``, and none below ``lowest`` or from
    ``stop`` on.
    """
    k = load_tile(keys, start, slots, columns, lowest, stop, stride_t, K, MASKED)
    score = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
    if MASKED:
        key = (start + slots)[None, :]
        seen = ((key < context) | (key <= last_key[:, None])) & (key >= lowest) & (key < stop)
        score = tl.where(seen, score, float("-inf"))
    new_highest = tl.maximum(highest, tl.max(score, 1))
    if MASKED:
        # A row that has seen no key yet: minus infinity minus itself is no number.
        base = tl.where(new_highest == float("-inf"), 0.0, new_highest)
    else:
        base = new_highest
    weight = tl.exp2(score - base[:, None])
    decay = tl.exp2(highest - base)
    v = load_tile(values, start, slots, columns, lowest, stop, stride_t, K, MASKED)
    acc = tl.dot(weight.to(v.dtype), v, acc * decay[:, None], input_precision=PRECISION)
    return new_highest, total * decay + tl.sum(weight, 1), acc


@triton.jit
def prompt_attention_kernel(
    query,  # [B, M, H, K]
    key_cache,  # [B, H, T, K]
    value_cache,  # [B, H, T, K]
    first_slot,  # int32 [B]
    sop_slot,  # int32 [B]
    last_row,  # int32 [1]
    out,  # [B, M, H, K]
    rows,  # M
    heads,  # H
    prefix,
    stride_b,
    stride_h,
    stride_t,
    scale,
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_T: tl.constexpr,
    PRECISION: tl.constexpr,
    PDL: tl.constexpr,
):
    """Attend with one program per (block of rows, sequence and head)."""
    pair = tl.program_id(1)
    batch = (pair // heads).to(tl.int64)
    head = (pair % heads).to(tl.int64)
    start_row = tl.program_id(0) * BLOCK_M
    row = start_row + tl.arange(0, BLOCK_M)
    columns = tl.arange(0, BLOCK_K)
    slots = tl.arange(0, BLOCK_T)
    wait_for_predecessor(PDL)
    first = tl.load(first_slot + batch)
    end_row = tl.minimum(tl.load(last_row) + 1, rows)
    if (start_row < end_row) & (start_row + BLOCK_M > first):
        context = tl.load(sop_slot + batch) + prefix
        stop = tl.minimum(tl.maximum(context, prefix + start_row + BLOCK_M), prefix + end_row)
        inside = ((row >= first) & (row < end_row))[:, None] & (columns < K)[None, :]
        place = ((batch * rows + row[:, None]) * heads + head) * K + columns[None, :]
        q = tl.load(query + place, mask=inside, other=0.0)
        cache = batch * stride_b + head * stride_h
        keys, values = key_cache + cache, value_cache + cache
        highest = tl.full([BLOCK_M], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        acc = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
        # Every row sees these tiles whole.
        whole = first + tl.maximum(tl.minimum(context, stop) - first, 0) // BLOCK_T * BLOCK_T
        for start in range(first, whole, BLOCK_T):
            highest, total, acc = attend(
                highest, total, acc, q, keys, values, start, first, stop, context, prefix + row, slots, columns,
                stride_t, scale, K, PRECISION, False,
            )  # fmt: skip
        for start in range(whole, stop, BLOCK_T):
            highest, total, acc = attend(
                highest, total, acc, q, keys, values, start, first, stop, context, prefix + row, slots, columns,
                stride_t, scale, K, PRECISION, True,
            )  # fmt: skip
        tl.store(out + place, acc / total[:, None], mask=inside)


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
    """Attend from the rows of left-padded prompts to the keys in the cache, in one launch.

    The keys of sequence b are the slots from ``first_slot[b]`` to ``prefix + last_row``. Row m sees those before
    ``prefix + sop_slot[b]``, the context, and those up to its own, ``prefix + m`` (stock's ``get_masks``). Rows before
    ``first_slot`` or after ``last_row`` are not written.

    Args:
        query: [B, M, H * K], contiguous.
        key_cache, value_cache: [B, H, T, K] of equal strides, last axis contiguous.
        first_slot, sop_slot: int32 [B]. last_row: int32 [1], below M.
        prefix: slots of a P-Tuning prefix; its keys stand directly before the row ``first_slot``.
        out: [B, M, H * K].

    Raises:
        ValueError: a shape does not fit.
    """
    batch, heads, capacity, size = key_cache.shape
    rows = query.shape[1]
    require(
        query.shape == (batch, rows, heads * size) and query.is_contiguous(),
        f"query is {tuple(query.shape)}: for the cache {tuple(key_cache.shape)} pass [{batch}, M, {heads * size}]",
    )
    require_equal_caches(key_cache, value_cache)
    out = torch.empty_like(query) if out is None else out
    config = prompt_attention_config(family(query.device), rows, query.element_size())
    pdl = uses_pdl(query.device)
    if query.numel():
        prompt_attention_kernel[(triton.cdiv(rows, config.block_m), batch * heads)](
            query,
            key_cache,
            value_cache,
            first_slot,
            sop_slot,
            last_row,
            out,
            rows,
            heads,
            prefix,
            *key_cache.stride()[:3],
            math.log2(math.e) / math.sqrt(size),
            K=size,
            BLOCK_K=max(triton.next_power_of_2(size), 16),
            BLOCK_M=config.block_m,
            BLOCK_T=config.block_t,
            PRECISION="ieee" if query.dtype == torch.float32 else "tf32",
            PDL=pdl,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
            **pdl_options(pdl),
        )
    return out
