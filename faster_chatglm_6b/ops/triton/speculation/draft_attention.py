"""Attention of the 1 + k positions of each sequence against the cache, the keys split over programs.

Rotary positions and the append to the cache, which may lie in pages, are in the same kernel, as in
``decode_attention``. The keys are read once for all positions of a sequence, whose few rows share the tensor cores'
tile.
"""

import math

import torch
import triton
import triton.language as tl

from ..common import (
    arrive,
    multiprocessor_count,
    pdl_options,
    require,
    require_equal_caches,
    require_pages,
    start_successor,
    wait_for_predecessor,
)
from ..configs import uses_pdl
from ..decode_attention import choose_splits, key_range, slot_offset
from ..fused_apply_rotary_emb import load_angles, load_head, require_tables
from ..workspace import Workspace, default_workspace

# The tensor cores' tile has no fewer rows. More splits than these would take longer to put together.
TILE_ROWS, MOST_SPLITS = 16, 8
# Keys per block, in numbers of two bytes; programs per multiprocessor that splitting aims at.
BLOCK_T, WAVES = 64, 2


@triton.jit
def add_tile(highest, total, acc, score, v, PRECISION: tl.constexpr):
    """Add keys with these scores [M, T], in powers of two, and values [T, K] to the running softmax of M rows."""
    new_highest = tl.maximum(highest, tl.max(score, 1))
    weight = tl.exp2(score - new_highest[:, None])
    decay = tl.exp2(highest - new_highest)
    acc = tl.dot(weight.to(v.dtype), v, acc * decay[:, None], input_precision=PRECISION)
    return new_highest, total * decay + tl.sum(weight, 1), acc


@triton.jit
def combine_parts(
    base, active, row, columns, ROWS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, SPLITS: tl.constexpr
):
    """Return the attention [M, K] over all keys from the ``active`` parts stored from ``base`` on.

    Each part holds the weighted sums of its values [ROWS, K], the highest scores and the sums of weights.
    """
    PART: tl.constexpr = ROWS * (BLOCK_K + 2)
    there = row < ROWS
    best = tl.full([BLOCK_M], float("-inf"), tl.float32)
    for part in tl.static_range(SPLITS):
        mask = there & (part < active)
        # Past L1, which may hold older values of what other programs stored.
        high = tl.load(base + part * PART + ROWS * BLOCK_K + row, mask=mask, other=float("-inf"), cache_modifier=".cg")
        best = tl.maximum(best, high)
    # Rows of the tile that are no positions have no parts.
    best = tl.where(there, best, 0.0)
    acc = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
    total = tl.where(there, 0.0, 1.0)
    for part in tl.static_range(SPLITS):
        mask = there & (part < active)
        ends = base + part * PART + ROWS * BLOCK_K + row
        share = tl.exp2(tl.load(ends, mask=mask, other=float("-inf"), cache_modifier=".cg") - best)
        total += share * tl.load(ends + ROWS, mask=mask, other=0.0, cache_modifier=".cg")
        source = base + part * PART + row[:, None] * BLOCK_K + columns[None, :]
        acc += share[:, None] * tl.load(source, mask=mask[:, None], other=0.0, cache_modifier=".cg")
    return acc / total[:, None]


@triton.jit
def draft_attention_kernel(
    qkv,  # packed projection [B, ROWS, H, 3, K]
    key_cache,  # [B, H, T, K], or pages [pages, H, PAGE, K]
    value_cache,  # as key_cache
    table,  # int32 [B, T / PAGE], or None without pages
    limit,  # int32 [B], or None without pages
    length,  # int32 [B]
    finished,  # int32 [B]
    first_key,  # int32 [B]
    position,  # int32 [B]
    sop_index,  # int32 [B]
    cos,  # [P, WIDTH / 2]
    sin,  # [P, WIDTH / 2]
    partial,  # float32 [B * H, SPLITS, ROWS * (BLOCK_K + 2)]
    counters,  # int32 [B * H], zero
    out,  # [B, ROWS, H, K]
    heads,  # H
    capacity,  # T
    positions,  # P
    stride_b,
    stride_h,
    stride_t,
    scale,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_T: tl.constexpr,
    SPLITS: tl.constexpr,
    WIDTH: tl.constexpr,
    PAGE: tl.constexpr,
    PADDED: tl.constexpr,
    PRECISION: tl.constexpr,
    PDL: tl.constexpr,
):
    """Attend with one program per (sequence and head, split); the first split has the new keys, too.

    PAGE and PADDED are as in ``decode_attention``.
    """
    start_successor(PDL)
    pair = tl.program_id(0)
    split = tl.program_id(1)
    batch = (pair // heads).to(tl.int64)
    head = (pair % heads).to(tl.int64)
    row = tl.arange(0, BLOCK_M)
    columns = tl.arange(0, BLOCK_K)
    slots = tl.arange(0, BLOCK_T)
    if PAGE > 0:
        cache = head * stride_h
        table += batch * (capacity // PAGE)
    else:
        cache = batch * stride_b + head * stride_h
    keys, values = key_cache + cache, value_cache + cache
    inside = (row < ROWS)[:, None] & (columns < K)[None, :]
    index = ((batch * ROWS + row[:, None]) * heads + head) * K
    wait_for_predecessor(PDL)
    end = tl.load(length + batch)
    # Rows that are done see their new keys only: their neighbours need not wait for them.
    is_done = tl.load(finished + batch) != 0
    lowest = tl.load(first_key + batch)
    first = lowest
    if PADDED:
        # No block crosses the end of a page.
        first = lowest // BLOCK_T * BLOCK_T
    first = tl.where(is_done, end, first)
    start, stop, active = key_range(first, end, split, SPLITS, BLOCK_T)
    if split < active:
        first_position = tl.minimum(tl.load(position + batch), positions - 1) + row * 0
        second_position = first_position
        if WIDTH < K:
            second_position = end + row - tl.load(sop_index + batch) + 1
            second_position = tl.minimum(tl.maximum(second_position, 0), positions - 1)
        c, s = load_angles(cos, sin, first_position[:, None], second_position[:, None], columns[None, :], inside, WIDTH)
        source = qkv + index * 3
        q_own, q_partner = load_head(source, columns[None, :], inside, WIDTH)
        q = (q_own * c + q_partner * s).to(out.dtype.element_ty)
        highest = tl.full([BLOCK_M], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        acc = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
        if split == 0:
            k_own, k_partner = load_head(source + K, columns[None, :], inside, WIDTH)
            k_new = (k_own * c + k_partner * s).to(out.dtype.element_ty)
            v_new = tl.load(source + 2 * K + columns[None, :], mask=inside, other=0.0)
            bound = capacity
            if PAGE > 0:
                # The table's entries from there on are no pages of this sequence.
                bound = tl.minimum(tl.load(limit + batch), capacity)
            target = slot_offset(table, end + row, bound, stride_b, stride_t, PAGE)[:, None] + columns[None, :]
            fits = (inside & (end + row < bound)[:, None] & (is_done == 0)) != 0
            tl.store(keys + target, k_new, mask=fits)
            tl.store(values + target, v_new, mask=fits)
            score = tl.dot(q, tl.trans(k_new), input_precision=PRECISION) * scale
            visible = (row[None, :] <= row[:, None]) & (row < ROWS)[None, :]
            score = tl.where(visible, score, float("-inf"))
            highest, total, acc = add_tile(highest, total, acc, score, v_new, PRECISION)
        for t in range(start, stop, BLOCK_T):
            slot = t + slots
            if PAGE > 0:
                source_t = slot_offset(table, t, stop, stride_b, stride_t, PAGE) + slots[:, None] * stride_t
            else:
                source_t = slot.to(tl.int64)[:, None] * stride_t
            source_t += columns[None, :]
            seen = slot < stop
            if PADDED:
                seen = seen & (slot >= lowest)
            there = seen[:, None] & (columns < K)[None, :]
            k = tl.load(keys + source_t, mask=there, other=0.0)
            score = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
            score = tl.where(seen[None, :], score, float("-inf"))
            v = tl.load(values + source_t, mask=there, other=0.0)
            highest, total, acc = add_tile(highest, total, acc, score, v, PRECISION)
        target_out = out + index + columns[None, :]
        if SPLITS == 1:
            tl.store(target_out, acc / total[:, None], mask=inside)
        elif active == 1:
            tl.store(target_out, acc / total[:, None], mask=inside)
        else:
            base = partial + pair.to(tl.int64) * SPLITS * ROWS * (BLOCK_K + 2)
            mine = base + split * ROWS * (BLOCK_K + 2)
            tl.store(mine + row[:, None] * BLOCK_K + columns[None, :], acc, mask=(row < ROWS)[:, None])
            tl.store(mine + ROWS * BLOCK_K + row, highest, mask=row < ROWS)
            tl.store(mine + ROWS * (BLOCK_K + 1) + row, total, mask=row < ROWS)
            if arrive(counters + pair, active):
                whole = combine_parts(base, active, row, columns, ROWS, BLOCK_M, BLOCK_K, SPLITS)
                tl.store(target_out, whole, mask=inside)


def draft_attention(
    qkv: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    length: torch.Tensor,
    finished: torch.Tensor,
    first_key: torch.Tensor,
    position: torch.Tensor,
    sop_index: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *,
    block_table: torch.Tensor | None = None,
    limit: torch.Tensor | None = None,
    padded: bool = False,
    splits: int | None = None,
    max_length: int | None = None,
    workspace: Workspace | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Rotate, append and attend for R positions of each sequence in one launch, each seeing those before it.

    Position j goes to slot ``length[b]`` + j, if the sequence has it, and turns as ``decode_attention`` turns a token
    of that slot.

    Args:
        qkv: [B, R, 3 * H * K], per head [q k v], R from 1 to 16.
        key_cache, value_cache, length, first_key, position, sop_index, cos, sin, block_table, padded: as of
            ``decode_attention``.
        limit: int32 [B], with a ``block_table`` only: the slots of each sequence. Its pages hold so many.
        finished: int32 [B]; a row where it is not 0 reads nothing of the cache and leaves it as it is.
        splits: parts that the keys are cut into, 1 to 8, fixed when a graph is captured and right for every length;
            None chooses for ``max_length`` keys (default T).
        out: [B, R, H * K].

    Raises:
        ValueError: a shape does not fit, or ``splits`` is out of range.
    """
    batch, heads, capacity, size = key_cache.shape
    page, rows = 0, qkv.shape[1]
    if block_table is not None:
        batch, page = qkv.shape[0], capacity
        capacity = block_table.shape[-1] * page
        require_pages(block_table, page, batch)
    require(
        (limit is None) == (block_table is None) and (limit is None or limit.numel() >= batch),
        "pass a block_table and a limit of each sequence, or none of them",
    )
    require(
        qkv.shape == (batch, rows, 3 * heads * size) and qkv.is_contiguous() and 1 <= rows <= TILE_ROWS,
        f"qkv is {tuple(qkv.shape)}: for the cache {tuple(key_cache.shape)} pass [{batch}, R, {3 * heads * size}] with "
        f"R from 1 to {TILE_ROWS}",
    )
    require_tables(cos, sin, size)
    require_equal_caches(key_cache, value_cache)
    workspace = workspace or default_workspace(key_cache.device, batch * rows)
    block_t = min(BLOCK_T * 2 // key_cache.element_size(), page or BLOCK_T)
    block_k = max(triton.next_power_of_2(size), 16)
    if splits is None:
        programs = multiprocessor_count(key_cache.device) * WAVES
        splits = min(choose_splits(batch * heads, max_length or capacity, block_t, programs), MOST_SPLITS)
    require(1 <= splits <= MOST_SPLITS, f"splits is {splits}; it must be between 1 and {MOST_SPLITS}")
    require(
        workspace.counters.numel() >= batch * heads
        and workspace.partial.numel() >= batch * heads * splits * rows * (block_k + 2),
        f"the workspace was made for fewer than {batch * rows} sequences of {heads} heads; make a larger one",
    )
    out = qkv.new_empty(batch, rows, heads * size) if out is None else out
    pdl = uses_pdl(key_cache.device)
    draft_attention_kernel[(batch * heads, splits)](
        qkv,
        key_cache,
        value_cache,
        block_table,
        limit,
        length,
        finished,
        first_key,
        position,
        sop_index,
        cos,
        sin,
        workspace.partial,
        workspace.counters,
        out,
        heads,
        capacity,
        cos.shape[0],
        *key_cache.stride()[:3],
        math.log2(math.e) / math.sqrt(size),
        K=size,
        ROWS=rows,
        BLOCK_M=TILE_ROWS,
        BLOCK_K=block_k,
        BLOCK_T=block_t,
        SPLITS=splits,
        WIDTH=2 * cos.shape[1],
        PAGE=page,
        PADDED=padded and page > 0,
        PRECISION="ieee" if qkv.dtype == torch.float32 else "tf32",
        PDL=pdl,
        num_warps=4,
        num_stages=2,
        **pdl_options(pdl),
    )
    return out
