"""Attention of one query row per sequence against the cache, the keys split over programs (Flash-Decoding).

Serve ``fused_multi_head_attention_inference_v2`` in the captured loop, with the rotary positions and the append to the
cache in the same kernel. The cache is contiguous, or lies in pages (Kwon et al. 2023).
"""

import math

import torch
import triton
import triton.language as tl

from .common import (
    arrive,
    multiprocessor_count,
    pdl_options,
    prefetch_to_l2,
    require,
    require_equal_caches,
    require_pages,
    start_successor,
    wait_for_predecessor,
)
from .configs import attention_config, family, uses_pdl
from .fused_apply_rotary_emb import load_angles, load_head, require_tables
from .workspace import MAX_SPLITS, Workspace, default_workspace


@triton.jit
def key_range(first, end, split, SPLITS: tl.constexpr, BLOCK_T: tl.constexpr):
    """Return the keys [start, stop) of this split and the number of splits that have any (at least 1)."""
    count = tl.maximum(end - first, 0)
    chunk = tl.maximum(tl.cdiv(tl.cdiv(count, SPLITS), BLOCK_T) * BLOCK_T, BLOCK_T)
    start = first + split * chunk
    return start, tl.minimum(start + chunk, end), tl.maximum(tl.cdiv(count, chunk), 1)


@triton.jit
def slot_offset(table, slot, bound, stride_b, stride_t, PAGE: tl.constexpr):
    """Return where a sequence's slot lies, from its own cache on, or with PAGE > 0 from the first page on.

    Slots from ``bound`` on have no page; they get that of page 0.
    """
    if PAGE > 0:
        page = tl.load(table + slot // PAGE, mask=slot < bound, other=0).to(tl.int64)
        return page * stride_b + slot % PAGE * stride_t
    else:
        return slot.to(tl.int64) * stride_t


@triton.jit
def load_block(
    key, value, table, lowest, first, stop, slots, columns, valid, stride_b, stride_t,
    PAGE: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    """Load keys and values of the slots from ``first`` on below ``stop`` (PADDED: from ``lowest`` on), 0 elsewhere."""
    slot = (first + slots).to(tl.int64)
    if PAGE > 0:
        source = slot_offset(table, first, stop, stride_b, stride_t, PAGE) + slots[:, None] * stride_t
    else:
        source = slot[:, None] * stride_t
    inside = (slot < stop)[:, None] & valid[None, :]
    if PADDED:
        inside = inside & (slot >= lowest)[:, None]
    source += columns[None, :]
    return tl.load(key + source, mask=inside, other=0.0), tl.load(value + source, mask=inside, other=0.0)


@triton.jit
def load_packed(packed, columns, valid, K: tl.constexpr, WIDTH: tl.constexpr):
    """Load query and key of one head, each with the columns it turns with, and the value."""
    q_own, q_partner = load_head(packed, columns, valid, WIDTH)
    k_own, k_partner = load_head(packed + K, columns, valid, WIDTH)
    return q_own, q_partner, k_own, k_partner, tl.load(packed + 2 * K + columns, mask=valid, other=0.0)


@triton.jit
def prefetch_first_block(
    key_cache, value_cache, cache, table, start, stop, stride_b, stride_t,
    K: tl.constexpr, BLOCK_T: tl.constexpr, PAGE: tl.constexpr,
):  # fmt: skip
    """Ask the L2 cache for a split's first block of keys and values.

    It asks for no more, as larger requests of many programs at once would crowd each other out of the cache.
    """
    rows = tl.minimum(stop - start, BLOCK_T)
    if K % 16 == 0 and rows > 0:
        SIZE: tl.constexpr = key_cache.dtype.element_ty.primitive_bitwidth // 8
        offset = cache + slot_offset(table, start, stop, stride_b, stride_t, PAGE)
        prefetch_to_l2(key_cache + offset, 0, 1, ((rows - 1) * stride_t + K) * SIZE)
        prefetch_to_l2(value_cache + offset, 0, 1, ((rows - 1) * stride_t + K) * SIZE)


@triton.jit
def combine_splits(base, active, columns, BLOCK_K: tl.constexpr, SPLITS_POWER: tl.constexpr):
    """Return the attention over all keys from the ``active`` parts stored from ``base`` on.

    Each part holds the weighted sum of its values, its highest score and its sum of weights.
    """
    part = tl.arange(0, SPLITS_POWER)
    there = part < active
    # Past L1, which may hold older values of what other programs stored.
    highs = tl.load(base + part * (BLOCK_K + 2) + BLOCK_K, mask=there, other=float("-inf"), cache_modifier=".cg")
    totals = tl.load(base + part * (BLOCK_K + 2) + BLOCK_K + 1, mask=there, other=0.0, cache_modifier=".cg")
    source = base + part[:, None] * (BLOCK_K + 2) + columns[None, :]
    accs = tl.load(source, mask=there[:, None], other=0.0, cache_modifier=".cg")
    share = tl.exp(highs - tl.max(highs, 0))
    return tl.sum(accs * share[:, None], 0) / tl.sum(totals * share, 0)


@triton.jit
def decode_attention_kernel(
    qkv,  # packed projection [B, H, 3, K]
    key_cache,  # [B, H, T, K], or pages [pages, H, PAGE, K]
    value_cache,  # as key_cache
    table,  # int32 [B, T / PAGE], or None without pages
    length,  # int32 [B]
    finished,  # int32 [B]
    first_key,  # int32 [B]
    position,  # int32 [B]
    sop_index,  # int32 [B]
    cos,  # [P, WIDTH / 2]
    sin,  # [P, WIDTH / 2]
    partial,  # float32 [B * H, SPLITS, BLOCK_K + 2]
    counters,  # int32 [B * H], zero
    out,  # [B, H, K]
    heads,  # H
    capacity,  # T
    positions,  # P
    stride_b,
    stride_h,
    stride_t,
    scale,
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_T: tl.constexpr,
    SPLITS: tl.constexpr,
    SPLITS_POWER: tl.constexpr,
    WIDTH: tl.constexpr,
    PAGE: tl.constexpr,
    PADDED: tl.constexpr,
    EARLY: tl.constexpr,
    HOLDS_BACK: tl.constexpr,
    PDL: tl.constexpr,
):
    """Attend with one program per (sequence and head, split).

    Each program rotates query and key of the projection; the first split writes key and value to slot ``length``.

    PAGE: slots of a page, a multiple of BLOCK_T; 0 for a contiguous cache.
    PADDED: the first key may lie within a page.
    EARLY: read all but the projection before the wait, because no kernel that may still run writes it.
    """
    start_successor(PDL, HOLDS_BACK)
    pair = tl.program_id(0)
    split = tl.program_id(1)
    batch = (pair // heads).to(tl.int64)
    head = (pair % heads).to(tl.int64)
    columns = tl.arange(0, BLOCK_K)
    valid = columns < K
    slots = tl.arange(0, BLOCK_T)
    if PAGE > 0:
        cache = head * stride_h
        table += batch * (capacity // PAGE)
    else:
        cache = batch * stride_b + head * stride_h
    packed = qkv + (batch * heads + head) * 3 * K
    if not EARLY:
        if PDL:
            # Before the wait these may be the values of the step before: good enough for a hint.
            hint_end = tl.minimum(tl.load(length + batch), capacity)
            hint_first = tl.load(first_key + batch)
            if PADDED:
                hint_first = hint_first // BLOCK_T * BLOCK_T
            start, stop, active = key_range(hint_first, hint_end, split, SPLITS, BLOCK_T)
            prefetch_first_block(
                key_cache, value_cache, cache, table, start, stop, stride_b, stride_t, K, BLOCK_T, PAGE
            )
        wait_for_predecessor(PDL, HOLDS_BACK)
        # Loads that do not depend on the length come first, so that their latencies overlap.
        q_own, q_partner, k_own, k_partner, v_new = load_packed(packed, columns, valid, K, WIDTH)
    end = tl.load(length + batch, volatile=True)
    # Rows that are done see their new key only: their neighbours need not wait for them.
    is_done = tl.load(finished + batch, volatile=True) != 0
    lowest = tl.load(first_key + batch)
    first = lowest
    if PADDED:
        # No block crosses the end of a page.
        first = lowest // BLOCK_T * BLOCK_T
    first = tl.where(is_done, end, first)
    start, stop, active = key_range(first, end, split, SPLITS, BLOCK_T)
    keys, values = key_cache + cache, value_cache + cache
    k, v = load_block(keys, values, table, lowest, start, stop, slots, columns, valid, stride_b, stride_t, PAGE, PADDED)
    first_position = tl.minimum(tl.load(position + batch), positions - 1)
    second_position = first_position
    if WIDTH < K:
        second_position = end - tl.load(sop_index + batch) + 1
        second_position = tl.minimum(tl.maximum(second_position, 0), positions - 1)
    c, s = load_angles(cos, sin, first_position, second_position, columns, valid, WIDTH)
    if EARLY:
        wait_for_predecessor(PDL, HOLDS_BACK)
        q_own, q_partner, k_own, k_partner, v_new = load_packed(packed, columns, valid, K, WIDTH)
    if split < active:
        q = (q_own * c + q_partner * s).to(out.dtype.element_ty).to(tl.float32) * scale
        highest = tl.full([], float("-inf"), tl.float32)
        total = tl.full([], 0.0, tl.float32)
        acc = tl.zeros([BLOCK_K], tl.float32)
        if split == 0:
            k_new = (k_own * c + k_partner * s).to(out.dtype.element_ty)
            target = slot_offset(table, end, capacity, stride_b, stride_t, PAGE) + columns
            # To Triton 3.9's interpreter a broadcast scalar is an integer: the comparison makes the mask one again.
            fits = (valid & (end < capacity) & (is_done == 0)) != 0
            tl.store(keys + target, k_new, mask=fits)
            tl.store(values + target, v_new, mask=fits)
            highest = tl.sum(q * k_new.to(tl.float32), 0)
            total = tl.full([], 1.0, tl.float32)
            acc = v_new.to(tl.float32)
        for t in range(start, stop, BLOCK_T):
            seen = t + slots < stop
            if PADDED:
                seen = seen & (t + slots >= lowest)
            score = tl.where(seen, tl.sum(k.to(tl.float32) * q[None, :], 1), float("-inf"))
            new_highest = tl.maximum(highest, tl.max(score, 0))
            weight = tl.exp(score - new_highest)
            decay = tl.exp(highest - new_highest)
            acc = acc * decay + tl.sum(weight[:, None] * v.to(tl.float32), 0)
            total = total * decay + tl.sum(weight, 0)
            highest = new_highest
            k, v = load_block(
                keys, values, table, lowest, t + BLOCK_T, stop, slots, columns, valid, stride_b, stride_t, PAGE, PADDED
            )
        target_out = out + (batch * heads + head) * K + columns
        if SPLITS == 1:
            tl.store(target_out, acc / total, mask=valid)
        elif active == 1:
            tl.store(target_out, acc / total, mask=valid)
        else:
            base = partial + pair.to(tl.int64) * SPLITS * (BLOCK_K + 2)
            mine = base + split * (BLOCK_K + 2)
            tl.store(mine + columns, acc)
            tl.store(mine + BLOCK_K, highest)
            tl.store(mine + BLOCK_K + 1, total)
            if arrive(counters + pair, active):
                tl.store(target_out, combine_splits(base, active, columns, BLOCK_K, SPLITS_POWER), mask=valid)


def choose_splits(pairs: int, max_length: int, block_t: int, programs: int) -> int:
    """Choose splits, none below a block, for about ``programs`` programs with ``pairs`` sequences times heads."""
    return max(min(programs // pairs, triton.cdiv(max_length, block_t), MAX_SPLITS), 1)


def decode_attention(
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
    padded: bool = False,
    splits: int | None = None,
    max_length: int | None = None,
    stable_state: bool = False,
    workspace: Workspace | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Rotate query and key, append to the cache and attend for one decode step, in one launch.

    The new key and value go to slot ``length[b]``. With tables [P, K / 4] the first half of a head turns by
    ``position[b]`` and the second by ``length[b] - sop_index[b] + 1``, clamped to the tables; with [P, K / 2]
    the whole head turns by ``position[b]``.

    Args:
        qkv: [B, 3 * H * K], per head [q k v].
        key_cache, value_cache: [B, H, T, K] of equal strides, last axis contiguous; pages [pages, H, S, K] if there is
            a ``block_table``.
        block_table: int32 [B, T / S], the pages of each sequence in order. S is a power of two from 16 on.
        padded: whether ``first_key`` may lie within a page; otherwise it is a multiple of S.
        length: int32 [B], slots filled, below T. first_key, position, sop_index: int32 [B].
        finished: int32 [B]; a row where it is not 0 reads nothing of the cache and leaves it as it is.
        cos, sin: [P, K / 4] or [P, K / 2].
        splits: parts that the keys are cut into, 1 to 64, fixed when a graph is captured and right for every length;
            None chooses for ``max_length`` keys (default T).
        stable_state: read all but ``qkv`` before the wait. The caller promises that no launch that may still run writes
            ``length``, ``finished``, ``first_key``, ``position``, ``sop_index``, the tables or the filled slots, as in
            a CUDA graph that holds one step and advances the lengths at its end.
        out: [B, H * K].

    Raises:
        ValueError: a shape does not fit, or ``splits`` is out of range.
    """
    batch, heads, capacity, size = key_cache.shape
    page = 0
    if block_table is not None:
        batch, page = qkv.numel() // (3 * heads * size), capacity
        capacity = block_table.shape[-1] * page
        require_pages(block_table, page, batch)
    require(
        qkv.numel() == batch * 3 * heads * size and qkv.is_contiguous(),
        f"qkv is {tuple(qkv.shape)}: for the cache {tuple(key_cache.shape)} pass [{batch}, {3 * heads * size}]",
    )
    require_tables(cos, sin, size)
    require_equal_caches(key_cache, value_cache)
    keys = max_length or capacity
    config = attention_config(family(key_cache.device), batch * heads, keys, key_cache.dtype)
    block_t = min(config.block_t, page or config.block_t)
    workspace = workspace or default_workspace(key_cache.device, batch)
    if splits is None:
        programs = multiprocessor_count(key_cache.device) * config.waves
        splits = choose_splits(batch * heads, keys, block_t, programs)
    require(1 <= splits <= MAX_SPLITS, f"splits is {splits}; it must be between 1 and {MAX_SPLITS}")
    block_k = triton.next_power_of_2(size)
    require(
        workspace.counters.numel() >= batch * heads
        and workspace.partial.numel() >= batch * heads * splits * (block_k + 2),
        f"the workspace was made for fewer than {batch} sequences of {heads} heads; make a larger one",
    )
    out = qkv.new_empty(batch, heads * size) if out is None else out
    pdl = uses_pdl(key_cache.device)
    decode_attention_kernel[(batch * heads, splits)](
        qkv,
        key_cache,
        value_cache,
        block_table,
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
        1.0 / math.sqrt(size),
        K=size,
        BLOCK_K=block_k,
        BLOCK_T=block_t,
        SPLITS=splits,
        SPLITS_POWER=triton.next_power_of_2(splits),
        WIDTH=2 * cos.shape[1],
        PAGE=page,
        PADDED=padded and page > 0,
        EARLY=stable_state and pdl,
        HOLDS_BACK=config.holds_back and batch == 1,
        PDL=pdl,
        num_warps=config.num_warps,
        **pdl_options(pdl),
    )
    return out
