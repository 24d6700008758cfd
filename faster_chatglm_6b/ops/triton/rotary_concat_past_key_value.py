"""Rotary positions of a prompt's queries and keys, and the append of keys and values to the cache, in one launch.

Serve ``fused_apply_rotary_emb`` and ``fused_attention_concat_past_key_value`` in the captured loop's prompt step.
"""

import torch
import triton
import triton.language as tl

from .common import pdl_options, require, require_equal_caches, wait_for_predecessor
from .configs import uses_pdl
from .fused_apply_rotary_emb import load_angles, load_head, require_tables

# Rows per program.
BLOCK_M = 16


@triton.jit
def rotary_concat_past_key_value_kernel(
    qkv,  # packed projection [B, M, H, 3, K]
    query,  # [B, M, H, K]
    key_cache,  # [B, H, T, K]
    value_cache,  # [B, H, T, K]
    first_slot,  # int32 [B]
    sop_slot,  # int32 [B]
    position,  # int32 [B]
    last_row,  # int32 [1]
    cos,  # [P, WIDTH / 2]
    sin,  # [P, WIDTH / 2]
    rows,  # M
    heads,  # H
    capacity,  # T
    positions,  # P
    prefix,
    stride_b,
    stride_h,
    stride_t,
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    WIDTH: tl.constexpr,
    PDL: tl.constexpr,
):
    """Serve BLOCK_M rows of one head and sequence per program; rows of padding and past the last one are left."""
    head = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.arange(0, BLOCK_K)[None, :]
    wait_for_predecessor(PDL)
    first = tl.load(first_slot + batch)
    sop = tl.load(sop_slot + batch)
    slot = prefix + row
    real = (row >= first) & (row <= tl.load(last_row)) & (row < rows) & (slot < capacity)
    valid = real[:, None] & (columns < K)
    first_position = tl.where(row < sop, row - first, tl.load(position + batch))
    first_position = tl.minimum(tl.maximum(first_position, 0), positions - 1)
    second_position = first_position
    if WIDTH < K:
        second_position = tl.minimum(tl.maximum(row - sop + 1, 0), positions - 1)
    c, s = load_angles(cos, sin, first_position[:, None], second_position[:, None], columns, valid, WIDTH)
    index = (batch * rows + row[:, None]) * heads + head
    source = qkv + index * 3 * K
    q_own, q_partner = load_head(source, columns, valid, WIDTH)
    k_own, k_partner = load_head(source + K, columns, valid, WIDTH)
    v = tl.load(source + 2 * K + columns, mask=valid, other=0.0)
    target = batch * stride_b + head.to(tl.int64) * stride_h + slot[:, None].to(tl.int64) * stride_t + columns
    tl.store(query + index * K + columns, q_own * c + q_partner * s, mask=valid)
    tl.store(key_cache + target, k_own * c + k_partner * s, mask=valid)
    tl.store(value_cache + target, v, mask=valid)


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

    Row m of a sequence goes to slot ``prefix`` + m. Before ``<sop>`` it has position m - ``first_slot`` and block
    position 0; from there on ``position`` and m - ``sop_slot`` + 1 (stock's ``get_position_ids``). With tables
    [P, K / 4] the first half of a head turns by the position and the second by the block position; with [P, K / 2] the
    whole head turns by the position. Both are clamped to the tables. Rows before ``first_slot`` or after ``last_row``,
    and those past the capacity, are neither read nor written.

    Args:
        qkv: [B, M, 3 * H * K], per head [q k v], contiguous.
        key_cache, value_cache: [B, H, T, K] of equal strides, last axis contiguous.
        first_slot, sop_slot, position: int32 [B]. last_row: int32 [1].
        cos, sin: [P, K / 4] or [P, K / 2].
        prefix: keys of a P-Tuning prefix before the first row.
        out: [B, M, H * K].

    Raises:
        ValueError: a shape does not fit.
    """
    batch, heads, capacity, size = key_cache.shape
    rows = qkv.shape[1]
    require(
        qkv.shape == (batch, rows, 3 * heads * size) and qkv.is_contiguous(),
        f"qkv is {tuple(qkv.shape)}: for the cache {tuple(key_cache.shape)} pass [{batch}, M, {3 * heads * size}]",
    )
    require_tables(cos, sin, size)
    require_equal_caches(key_cache, value_cache)
    out = qkv.new_empty(batch, rows, heads * size) if out is None else out
    pdl = uses_pdl(qkv.device)
    if qkv.numel():
        rotary_concat_past_key_value_kernel[(triton.cdiv(rows, BLOCK_M), heads, batch)](
            qkv,
            out,
            key_cache,
            value_cache,
            first_slot,
            sop_slot,
            position,
            last_row,
            cos,
            sin,
            rows,
            heads,
            capacity,
            cos.shape[0],
            prefix,
            *key_cache.stride()[:3],
            K=size,
            BLOCK_K=triton.next_power_of_2(size),
            BLOCK_M=BLOCK_M,
            WIDTH=2 * cos.shape[1],
            PDL=pdl,
            num_warps=4,
            **pdl_options(pdl),
        )
    return out
