"""Append keys and values to a preallocated cache, in place."""

import torch
import triton
import triton.language as tl

from .common import pdl_options, require, wait_for_predecessor
from .configs import uses_pdl


@triton.jit
def concat_past_key_value_kernel(
    key,  # [B, H, M, K]
    value,  # [B, H, M, K]
    key_cache,  # [B, H, T, K]
    value_cache,  # [B, H, T, K]
    length,  # int32 [1], or an int
    rows,  # M
    heads,  # H
    capacity,  # T
    size,  # K
    key_strides_b,
    key_strides_h,
    key_strides_m,
    value_strides_b,
    value_strides_h,
    value_strides_m,
    cache_strides_b,
    cache_strides_h,
    cache_strides_t,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    LENGTH_ON_DEVICE: tl.constexpr,
    PDL: tl.constexpr,
):
    head = (tl.program_id(1) % heads).to(tl.int64)
    batch = (tl.program_id(1) // heads).to(tl.int64)
    row = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)[:, None]
    column = tl.arange(0, BLOCK_K)[None, :]
    wait_for_predecessor(PDL)
    if LENGTH_ON_DEVICE:
        start = tl.load(length)
    else:
        start = length
    valid = (row < rows) & (start + row < capacity) & (column < size)
    k = tl.load(key + batch * key_strides_b + head * key_strides_h + row * key_strides_m + column, mask=valid)
    v = tl.load(value + batch * value_strides_b + head * value_strides_h + row * value_strides_m + column, mask=valid)
    target = batch * cache_strides_b + head * cache_strides_h + (start + row) * cache_strides_t + column
    tl.store(key_cache + target, k, mask=valid)
    tl.store(value_cache + target, v, mask=valid)


def fused_attention_concat_past_key_value(
    key: torch.Tensor,
    value: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    length: int | torch.Tensor,
) -> None:
    """Write key and value into slots [length, length + M) of the caches; rows past the capacity are dropped.

    Args:
        key, value: [B, H, M, K], any strides with the last axis contiguous.
        key_cache, value_cache: [B, H, T, K] of equal strides, last axis contiguous.
        length: slots already filled, an int or a device int32 [1].

    Raises:
        ValueError: a shape or stride does not fit, or an int length leaves too little room.
    """
    batch, heads, rows, size = key.shape
    capacity = key_cache.shape[2]
    require(
        value.shape == key.shape and key_cache.shape == value_cache.shape == (batch, heads, capacity, size),
        f"key is {tuple(key.shape)}, value {tuple(value.shape)}, the caches {tuple(key_cache.shape)} and "
        f"{tuple(value_cache.shape)}: pass [B, H, M, K] twice and [B, H, T, K] twice",
    )
    require(
        key_cache.stride() == value_cache.stride() and key_cache.stride(3) == key.stride(3) == value.stride(3) == 1,
        "the caches must have equal strides, and every tensor a contiguous last axis",
    )
    on_device = isinstance(length, torch.Tensor)
    require(
        on_device or 0 <= length <= capacity - rows,
        f"{rows} rows do not fit after {length} of {capacity} slots; allocate a longer cache",
    )
    pdl = uses_pdl(key.device)
    block_m = min(triton.next_power_of_2(max(rows, 1)), 16)
    if key.numel():
        concat_past_key_value_kernel[(triton.cdiv(rows, block_m), batch * heads)](
            key,
            value,
            key_cache,
            value_cache,
            length,
            rows,
            heads,
            capacity,
            size,
            *key.stride()[:3],
            *value.stride()[:3],
            *key_cache.stride()[:3],
            BLOCK_M=block_m,
            BLOCK_K=triton.next_power_of_2(size),
            LENGTH_ON_DEVICE=on_device,
            PDL=pdl,
            num_warps=4,
            **pdl_options(pdl),
        )
