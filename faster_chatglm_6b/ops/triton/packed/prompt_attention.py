"""Attention of packed prompts against keys and values in pages: every row sees the whole context of its sequence.

Serve ``fused_multi_head_attention_inference_v2`` for prompts of a running batch.
"""

import math

import torch
import triton
import triton.language as tl

from ..common import pdl_options, require, require_equal_caches, require_pages, wait_for_predecessor
from ..configs import family, prompt_attention_config, uses_pdl
from ..prompt_attention import attend

# The numbers of a block, in this order.
BLOCK_FIELDS = ("row", "sequence", "index", "length")


def packed_prompt_block(longest: int, device: torch.device, element_size: int) -> int:
    """Return the rows of a block of queries for prompts of up to ``longest`` tokens."""
    return prompt_attention_config(family(device), longest, element_size).block_m


@triton.jit
def slots_of_page(pages, table, slot, stride_b, stride_t, PAGE: tl.constexpr):
    """Return a pointer from which on the slots of one page, that of ``slot``, lie as in a contiguous cache."""
    page = tl.load(table + slot // PAGE).to(tl.int64)
    return pages + page * stride_b - (slot - slot % PAGE) * stride_t


@triton.jit
def packed_prompt_attention_kernel(
    query,  # [M, H, K]
    key_pages,  # [pages, H, PAGE, K]
    value_pages,  # [pages, H, PAGE, K]
    table,  # int32 [B, pages_per_row]
    blocks,  # int32 [N, 4]
    first_key,  # int32 [B]
    sop_slot,  # int32 [B]
    out,  # [M, H, K]
    heads,  # H
    pages_per_row,
    prefix,
    stride_b,
    stride_h,
    stride_t,
    scale,
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_T: tl.constexpr,
    PAGE: tl.constexpr,
    PADDED: tl.constexpr,
    PRECISION: tl.constexpr,
    PDL: tl.constexpr,
):
    """Attend with one program per (block of rows of one sequence, head).

    PADDED: the first key may lie within a page.
    """
    block = tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    columns = tl.arange(0, BLOCK_K)
    slots = tl.arange(0, BLOCK_T)
    wait_for_predecessor(PDL)
    sequence = tl.load(blocks + block * 4 + 1)
    if sequence >= 0:
        start_index = tl.load(blocks + block * 4 + 2)
        length = tl.load(blocks + block * 4 + 3)
        index = start_index + tl.arange(0, BLOCK_M)
        row = tl.load(blocks + block * 4) + tl.arange(0, BLOCK_M)
        table += sequence * pages_per_row
        lowest = tl.load(first_key + sequence)
        context = tl.load(sop_slot + sequence) + prefix
        stop = tl.minimum(tl.maximum(context, prefix + start_index + BLOCK_M), prefix + length)
        inside = (index < length)[:, None] & (columns < K)[None, :]
        place = (row[:, None].to(tl.int64) * heads + head) * K + columns[None, :]
        q = tl.load(query + place, mask=inside, other=0.0)
        keys, values = key_pages + head * stride_h, value_pages + head * stride_h
        highest = tl.full([BLOCK_M], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        acc = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
        last_key = prefix + index
        start_masked = lowest // BLOCK_T * BLOCK_T
        if not PADDED:
            # Every row sees these blocks whole.
            whole = lowest + tl.maximum(tl.minimum(context, stop) - lowest, 0) // BLOCK_T * BLOCK_T
            for start in range(lowest, whole, BLOCK_T):
                k = slots_of_page(keys, table, start, stride_b, stride_t, PAGE)
                v = slots_of_page(values, table, start, stride_b, stride_t, PAGE)
                highest, total, acc = attend(
                    highest, total, acc, q, k, v, start, lowest, stop, context, last_key, slots, columns, stride_t,
                    scale, K, PRECISION, False,
                )  # fmt: skip
            start_masked = whole
        for start in range(start_masked, stop, BLOCK_T):
            k = slots_of_page(keys, table, start, stride_b, stride_t, PAGE)
            v = slots_of_page(values, table, start, stride_b, stride_t, PAGE)
            highest, total, acc = attend(
                highest, total, acc, q, k, v, start, lowest, stop, context, last_key, slots, columns, stride_t, scale,
                K, PRECISION, True,
            )  # fmt: skip
        tl.store(out + place, acc / total[:, None], mask=inside)


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
    """Attend from the rows of packed prompts to the keys of their sequences, in one launch.

    Token i of sequence b sees the slots from ``first_key[b]`` to those before ``prefix + sop_slot[b]``, the context,
    and those up to its own, ``prefix + i``, as far as the prompt reaches (stock's ``get_masks``).

    Args:
        query: [M, H * K], contiguous.
        key_pages, value_pages: [pages, H, S, K] of equal strides, last axis contiguous. S is a power of two from 16 on.
        block_table: int32 [B, pages of a sequence].
        blocks: int32 [N, 4]. A block is up to ``packed_prompt_block(longest)`` rows of one prompt: its first row, its
            sequence (-1 for no block), the index of its first token in the prompt, and the tokens of the prompt. Rows
            of no block are not written.
        first_key, sop_slot: int32 [B].
        longest: tokens of the longest prompt that there may be. It only decides the shape of blocks.
        prefix: slots of a P-Tuning prefix before the first token.
        padded: whether ``first_key`` may lie within a page; otherwise it is a multiple of S.
        out: [M, H * K].

    Raises:
        ValueError: a shape does not fit.
    """
    _, heads, page, size = key_pages.shape
    require(
        query.shape[1:] == (heads * size,) and query.is_contiguous(),
        f"query is {tuple(query.shape)}: for the pages {tuple(key_pages.shape)} pass [M, {heads * size}]",
    )
    require(
        blocks.shape[1:] == (len(BLOCK_FIELDS),) and blocks.is_contiguous(),
        f"blocks is {tuple(blocks.shape)}; pass [N, {len(BLOCK_FIELDS)}]",
    )
    require_equal_caches(key_pages, value_pages)
    require_pages(block_table, page)
    out = torch.empty_like(query) if out is None else out
    config = prompt_attention_config(family(query.device), longest, query.element_size())
    pdl = uses_pdl(query.device)
    if query.numel() and blocks.numel():
        packed_prompt_attention_kernel[(blocks.shape[0], heads)](
            query,
            key_pages,
            value_pages,
            block_table,
            blocks,
            first_key,
            sop_slot,
            out,
            heads,
            block_table.shape[1],
            prefix,
            *key_pages.stride()[:3],
            math.log2(math.e) / math.sqrt(size),
            K=size,
            BLOCK_K=max(triton.next_power_of_2(size), 16),
            BLOCK_M=config.block_m,
            BLOCK_T=min(config.block_t, page),
            PAGE=page,
            PADDED=padded,
            PRECISION="ieee" if query.dtype == torch.float32 else "tf32",
            PDL=pdl,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
            **pdl_options(pdl),
        )
    return out
