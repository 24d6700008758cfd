"""Rotary positions of packed prompts, and the append of their keys and values to pages, in one launch.

Serve ``fused_apply_rotary_emb`` and ``fused_attention_concat_past_key_value`` for prompts of a running batch.
"""

import torch
import triton
import triton.language as tl

from ..common import pdl_options, require, require_equal_caches, require_pages, wait_for_predecessor
from ..configs import uses_pdl
from ..fused_apply_rotary_emb import load_angles, load_head, require_tables

# Rows per program.
BLOCK_M = 16


@triton.jit
def packed_rotary_concat_kernel(
    qkv,  # packed projection [M, H, 3, K]
    query,  # [M, H, K]
    key_pages,  # [pages, H, PAGE, K]
    value_pages,  # [pages, H, PAGE, K]
    table,  # int32 [B, pages_per_row]
    sequence,  # int32 [M]
    index,  # int32 [M]
    sop_slot,  # int32 [B]
    position,  # int32 [B]
    cos,  # [P, WIDTH / 2]
    sin,  # [P, WIDTH / 2]
    rows,  # M
    heads,  # H
    pages_per_row,
    positions,  # P
    prefix,
    stride_b,
    stride_h,
    stride_t,
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    WIDTH: tl.constexpr,
    PAGE: tl.constexpr,
    PDL: tl.constexpr,
):
    """Serve BLOCK_M rows of one head per program; rows of no sequence are left."""
    head = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.arange(0, BLOCK_K)[None, :]
    wait_for_predecessor(PDL)
    place = tl.load(sequence + row, mask=row < rows, other=-1)
    here = tl.load(index + row, mask=row < rows, other=0)
    slot = prefix + here
    real = (place >= 0) & (slot < pages_per_row * PAGE)
    valid = real[:, None] & (columns < K)
    sop = tl.load(sop_slot + place, mask=real, other=0)
    first_position = tl.where(here < sop, here, tl.load(position + place, mask=real, other=0))
    first_position = tl.minimum(tl.maximum(first_position, 0), positions - 1)
    second_position = first_position
    if WIDTH < K:
        second_position = tl.minimum(tl.maximum(here - sop + 1, 0), positions - 1)
    c, s = load_angles(cos, sin, first_position[:, None], second_position[:, None], columns, valid, WIDTH)
    source = (row[:, None].to(tl.int64) * heads + head) * K
    q_own, q_partner = load_head(qkv + source * 3, columns, valid, WIDTH)
    k_own, k_partner = load_head(qkv + source * 3 + K, columns, valid, WIDTH)
    v = tl.load(qkv + source * 3 + 2 * K + columns, mask=valid, other=0.0)
    page = tl.load(table + place * pages_per_row + slot // PAGE, mask=real, other=0).to(tl.int64)
    target = (page * stride_b + head * stride_h + slot % PAGE * stride_t)[:, None] + columns
    tl.store(query + source + columns, q_own * c + q_partner * s, mask=valid)
    tl.store(key_pages + target, k_own * c + k_partner * s, mask=valid)
    tl.store(value_pages + target, v, mask=valid)


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

    The token ``index[m]`` of sequence ``sequence[m]`` goes to slot ``prefix + index[m]`` of that sequence. Positions
    are those of ``rotary_concat_past_key_value`` without padding.

    Args:
        qkv: [M, 3 * H * K], per head [q k v], contiguous.
        key_pages, value_pages: [pages, H, S, K] of equal strides, last axis contiguous. S is a power of two from 16 on.
        block_table: int32 [B, pages of a sequence].
        sequence, index: int32 [M]; rows whose sequence is -1 are neither read nor written.
        sop_slot, position: int32 [B].
        cos, sin: [P, K / 4] or [P, K / 2].
        prefix: slots of a P-Tuning prefix before the first token.
        out: [M, H * K].

    Raises:
        ValueError: a shape does not fit.
    """
    _, heads, page, size = key_pages.shape
    rows = qkv.shape[0]
    require(
        qkv.shape == (rows, 3 * heads * size) and qkv.is_contiguous(),
        f"qkv is {tuple(qkv.shape)}: for the pages {tuple(key_pages.shape)} pass [M, {3 * heads * size}]",
    )
    require(
        sequence.numel() >= rows and index.numel() >= rows,
        f"qkv has {rows} rows, but sequence {sequence.numel()} and index {index.numel()}: pass one for each row",
    )
    require_tables(cos, sin, size)
    require_equal_caches(key_pages, value_pages)
    require_pages(block_table, page)
    out = qkv.new_empty(rows, heads * size) if out is None else out
    pdl = uses_pdl(qkv.device)
    if rows:
        packed_rotary_concat_kernel[(triton.cdiv(rows, BLOCK_M), heads)](
            qkv,
            out,
            key_pages,
            value_pages,
            block_table,
            sequence,
            index,
            sop_slot,
            position,
            cos,
            sin,
            rows,
            heads,
            block_table.shape[1],
            cos.shape[0],
            prefix,
            *key_pages.stride()[:3],
            K=size,
            BLOCK_K=triton.next_power_of_2(size),
            BLOCK_M=BLOCK_M,
            WIDTH=2 * cos.shape[1],
            PAGE=page,
            PDL=pdl,
            num_warps=4,
            **pdl_options(pdl),
        )
    return out
