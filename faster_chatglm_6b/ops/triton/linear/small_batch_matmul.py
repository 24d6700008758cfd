"""x W^T for 2 to 32 rows of x on the tensor cores, still bound by reading the weight.

The weight rows take the M side of the matrix instruction (at least 16) and the few rows of x its N side (16 to 32):
acc [BLOCK_N, BLOCK_M] = W tile x^T.
"""

import torch
import triton
import triton.language as tl

from ..common import (
    add_ends,
    arrive,
    pdl_options,
    prefetch_to_l2,
    start_successor,
    sum_parts,
    wait_for_predecessor,
)
from ..configs import Dot, uses_pdl

# Columns to ask the L2 cache for before the wait.
PREFETCH = 128


@triton.jit
def small_batch_matmul_kernel(
    x,  # [M, K]
    weight,  # [N, K]
    bias,  # [N]
    residual,  # [M, N]
    out,  # [M, N]
    partial,  # float32 [SPLITS, N, BLOCK_M]
    counters,  # int32 [cdiv(N, BLOCK_N)], zero
    M,
    N,
    beta,
    K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLITS: tl.constexpr,
    PREFETCH: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    GELU: tl.constexpr,
    PDL: tl.constexpr,
):
    start_successor(PDL)
    # Columns per split, a multiple of BLOCK_K.
    PART: tl.constexpr = (K + SPLITS * BLOCK_K - 1) // (SPLITS * BLOCK_K) * BLOCK_K
    EVEN: tl.constexpr = PART * SPLITS == K
    tile = tl.program_id(0)
    first = tl.program_id(1) * PART
    row = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    # Rows past the end read row N - 1 again; their results are not stored.
    safe_row = tl.minimum(row, N - 1).to(tl.int64)
    m = tl.arange(0, BLOCK_M)
    column = tl.arange(0, BLOCK_K)
    if PDL and PREFETCH > 0:
        SIZE: tl.constexpr = weight.dtype.element_ty.primitive_bitwidth // 8
        start_row = tile * BLOCK_N
        source = weight + start_row.to(tl.int64) * K + first
        columns = tl.minimum(K - first, PREFETCH)
        prefetch_to_l2(source, K * SIZE, tl.minimum(N - start_row, BLOCK_N), columns * SIZE)
    wait_for_predecessor(PDL)
    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for start in range(first, first + PART, BLOCK_K):
        w_pointers = weight + safe_row[:, None] * K + (start + column)[None, :]
        x_pointers = x + m[None, :] * K + (start + column)[:, None]
        if EVEN:
            w = tl.load(w_pointers, eviction_policy="evict_first")
            x_block = tl.load(x_pointers, mask=(m < M)[None, :], other=0.0)
        else:
            valid = start + column < K
            w = tl.load(w_pointers, mask=valid[None, :], other=0.0, eviction_policy="evict_first")
            x_block = tl.load(x_pointers, mask=valid[:, None] & (m < M)[None, :], other=0.0)
        acc = tl.dot(w, x_block, acc)
    last = True
    if SPLITS > 1:
        cell = row.to(tl.int64)[:, None] * BLOCK_M + m[None, :]
        mine = partial + tl.program_id(1).to(tl.int64) * N * BLOCK_M
        tl.store(mine + cell, acc, mask=(row < N)[:, None])
        last = arrive(counters + tile, SPLITS)
    if last:
        if SPLITS > 1:
            acc = sum_parts(partial, cell, tl.cast(N, tl.int64) * BLOCK_M, (row < N)[:, None], SPLITS)
        valid = (row < N)[:, None] & (m < M)[None, :]
        target = m[None, :].to(tl.int64) * N + row[:, None]
        acc = add_ends(acc, bias, residual, row, target, valid, N, beta, HAS_BIAS, HAS_RESIDUAL, GELU)
        tl.store(out + target, acc, mask=valid)


def padded_rows(rows: int) -> int:
    """Round ``rows`` up to a power of two from 16 on: at 8 Triton 3.6 leaves Hopper's own matrix instruction unused."""
    return max(triton.next_power_of_2(rows), 16)


def launch_small_batch_matmul(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    beta: float,
    gelu_epilogue: bool,
    out: torch.Tensor,
    config: Dot,
    partial: torch.Tensor,
    counters: torch.Tensor,
) -> None:
    """Compute out [M, N] = epilogue(x [M, K] weight [N, K]^T), M <= 64, float16 or bfloat16; all contiguous.

    If the configuration splits the columns, ``partial`` (float32) needs splits * N * padded rows values, and
    ``counters`` (int32, zero) one per row block.
    """
    rows, k = x.shape
    n = weight.shape[0]
    pdl = uses_pdl(x.device)
    small_batch_matmul_kernel[(triton.cdiv(n, config.block_n), config.splits)](
        x,
        weight,
        weight if bias is None else bias,
        x if residual is None else residual,
        out,
        partial,
        counters,
        rows,
        n,
        beta,
        K=k,
        BLOCK_M=padded_rows(rows),
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        SPLITS=config.splits,
        PREFETCH=PREFETCH if k * x.element_size() % 16 == 0 else 0,
        HAS_BIAS=bias is not None,
        HAS_RESIDUAL=residual is not None,
        GELU=gelu_epilogue,
        PDL=pdl,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        **pdl_options(pdl),
    )
