"""x W^T for 9 to 256 rows of x and an int8 or int4 weight, on Triton's own ``dot``.

As in ``linear/small_batch_matmul`` the weight rows take the M side of the matrix instruction and the rows of x its N
side: acc [BLOCK_N, BLOCK_M] = W tile x^T. Shared memory holds the stored integers. They become halves in registers,
from where the instruction takes them: Hopper's reads only x from shared memory.

An element of the weight is a pair of columns, 16 bits of int8 or 8 bits of int4. A lane loads pairs, so joining the two
columns moves nothing between lanes. The compiled code shows it (``test_quantized_aot.py``).
"""

import torch
import triton
import triton.language as tl

from ..common import (
    add_ends,
    arrive,
    prefetch_to_l2,
    start_successor,
    sum_parts,
    wait_for_predecessor,
)
from .configs import CHUNK_BYTES, Tiles
from .launching import shared_options
from .mma import join_lines

# Groups of columns that share a scale are multiples of this.
LEAST_GROUP = 32
# Bytes of each weight row to ask the L2 cache for before the wait.
PREFETCH = 256

# Four bits: the even column is in the high nibble. The sign bits are flipped, so that they count from 0 to 15 in the
# mantissas of a pair of numbers: 1024 + 16 (even + 8) and 1024 + (odd + 8) of half precision.
_INT4_HALF = join_lines(
    ".reg .b32 p, k, m;",
    "prmt.b32 p, $2, 0, 0x4040;",
    "lop3.b32 p, p, 0x000F00F0, 0x64086480, 0x6A;",
    "mov.b32 k, 0x3C002C00;",  # 1, 1 / 16
    "mov.b32 m, 0xE408D480;",  # -1032, -72
    "fma.rn.f16x2 p, p, k, m;",
    "mov.b32 {$0, $1}, p;",
)
# The mantissa of bfloat16 has seven bits, so the high nibble comes down first.
_INT4_BFLOAT = join_lines(
    ".reg .b32 p, k, m;",
    "shr.u32 p, $2, 4;",
    "mad.lo.u32 p, $2, 0x00010000, p;",
    "lop3.b32 p, p, 0x000F000F, 0x43084308, 0x6A;",  # 136 + integer
    "mov.b32 k, 0x3F803F80;",  # 1
    "mov.b32 m, 0xC308C308;",  # -136
    "fma.rn.bf16x2 p, p, k, m;",
    "mov.b32 {$0, $1}, p;",
)
_INT8_HALF = join_lines(
    ".reg .b32 p, k;",
    "xor.b32 p, $2, 0x00008080;",
    "prmt.b32 p, p, 0x64646464, 0x4140;",  # 1152 + integer
    "mov.b32 k, 0x64806480;",
    "sub.rn.f16x2 p, p, k;",
    "mov.b32 {$0, $1}, p;",
)
# (128 + seven bits) + (-128 or, with the sign bit, -256).
_INT8_BFLOAT = join_lines(
    ".reg .b32 p, a, b, k;",
    "prmt.b32 p, $2, 0, 0x4140;",
    "lop3.b32 a, p, 0x007F007F, 0x43004300, 0xEA;",
    "lop3.b32 b, p, 0x00800080, 0xC300C300, 0xEA;",
    "mov.b32 k, 0x3F803F80;",
    "fma.rn.bf16x2 p, a, k, b;",
    "mov.b32 {$0, $1}, p;",
)


@triton.jit
def columns_of(pairs, BITS: tl.constexpr, BFLOAT: tl.constexpr, INTERPRETED: tl.constexpr):
    """Unpack pairs of columns [rows, pairs], int16 or int8, to halves [rows, 2 * pairs].

    The interpreter gets float32, because its ``dot`` takes no bfloat16.
    """
    if INTERPRETED:
        wide = pairs.to(tl.int32)
        even = ((wide >> 4) if BITS == 4 else ((wide << 24) >> 24)).to(tl.float32)
        odd = (((wide << 28) >> 28) if BITS == 4 else (wide >> 8)).to(tl.float32)
    else:
        words = pairs.to(tl.uint8 if BITS == 4 else tl.uint16, bitcast=True).to(tl.int32)
        if BFLOAT:
            code: tl.constexpr = _INT4_BFLOAT if BITS == 4 else _INT8_BFLOAT
            even, odd = tl.inline_asm_elementwise(code, "=h,=h,r", [words], (tl.bfloat16, tl.bfloat16), True, 1)
        else:
            code: tl.constexpr = _INT4_HALF if BITS == 4 else _INT8_HALF
            even, odd = tl.inline_asm_elementwise(code, "=h,=h,r", [words], (tl.float16, tl.float16), True, 1)
    return tl.reshape(tl.join(even, odd), [pairs.shape[0], 2 * pairs.shape[1]])


@triton.jit
def finished(acc, INTERPRETED: tl.constexpr):
    """Return the sums once the matrix instructions that add to them are done.

    Hopper's read the weight's registers while they run. Triton 3.6 lets some of them run on into the next round, which
    unpacks its weights into the same registers: now and then a sum was wrong. Any use of the sums makes it wait.
    """
    if not INTERPRETED:
        acc = tl.inline_asm_elementwise("", "=f,0", [acc], tl.float32, True, 1)
    return acc


@triton.jit
def quantized_tiles_kernel(
    x,  # [M, K]
    weight,  # [N, K / 2], pairs of columns: int16 of int8, int8 of int4
    scale,  # [N] or, with groups, [N, K / GROUP]
    bias,  # [N]
    residual,  # [M, N]
    out,  # [M, N]
    partial,  # float32 [SPLITS, cdiv(M, BLOCK_M), N, BLOCK_M]
    counters,  # int32 [cdiv(N, BLOCK_N) * cdiv(M, BLOCK_M)], zero
    M,
    N,
    beta,
    K: tl.constexpr,
    BITS: tl.constexpr,
    BFLOAT: tl.constexpr,
    GROUP: tl.constexpr,  # columns that share a scale, a multiple of BLOCK_K; 0 for whole rows
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLITS: tl.constexpr,
    PREFETCH: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    GELU: tl.constexpr,
    PDL: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    start_successor(PDL)
    # Columns per split, a multiple of BLOCK_K.
    PART: tl.constexpr = (K + SPLITS * BLOCK_K - 1) // (SPLITS * BLOCK_K) * BLOCK_K
    EVEN: tl.constexpr = PART * SPLITS == K
    # The blocks of x rows that share a weight tile follow one another.
    row_blocks = tl.cdiv(M, BLOCK_M)
    tile, row_block = tl.program_id(0) // row_blocks, tl.program_id(0) % row_blocks
    first = tl.program_id(1) * PART
    row = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    # Rows past the end read row N - 1 again; their results are not stored.
    safe_row = tl.minimum(row, N - 1).to(tl.int64)
    place = tl.arange(0, BLOCK_M)
    m = row_block * BLOCK_M + place
    safe_m = tl.minimum(m, M - 1).to(tl.int64)
    pair = tl.arange(0, BLOCK_K // 2)
    column = tl.arange(0, BLOCK_K)
    if PDL and PREFETCH > 0:
        start_row = tile * BLOCK_N
        source = weight + start_row.to(tl.int64) * (K // 2) + first // 2
        row_bytes = tl.minimum((K - first) * BITS // 8, PREFETCH)
        prefetch_to_l2(source, K * BITS // 8, tl.minimum(N - start_row, BLOCK_N), row_bytes)
    if GROUP != 0:
        GROUPS: tl.constexpr = K // GROUP
        scales = scale + safe_row * GROUPS
        next_scale = tl.load(scales + tl.minimum(first // GROUP, GROUPS - 1)).to(tl.float32)
    wait_for_predecessor(PDL)
    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for start in range(first, first + PART, BLOCK_K):
        w_pointers = weight + safe_row[:, None] * (K // 2) + (start // 2 + pair)[None, :]
        x_pointers = x + safe_m[None, :] * K + (start + column)[:, None]
        if EVEN:
            pairs = tl.load(w_pointers, eviction_policy="evict_first")
            x_block = tl.load(x_pointers)
        else:
            pairs = tl.load(
                w_pointers, mask=(start // 2 + pair < K // 2)[None, :], other=0, eviction_policy="evict_first"
            )
            x_block = tl.load(x_pointers, mask=(start + column < K)[:, None], other=0.0)
        w = columns_of(pairs, BITS, BFLOAT, INTERPRETED)
        if INTERPRETED:
            x_block = x_block.to(tl.float32)
        if GROUP != 0:
            # Read one round ahead, because nothing else hides the time that this read takes.
            group_scale = next_scale
            next_scale = tl.load(scales + tl.minimum((start + BLOCK_K) // GROUP, GROUPS - 1)).to(tl.float32)
            acc += tl.dot(w, x_block) * group_scale[:, None]
        else:
            acc = finished(tl.dot(w, x_block, acc), INTERPRETED)
    last = True
    if SPLITS > 1:
        cell = (row_block * N + row).to(tl.int64)[:, None] * BLOCK_M + place[None, :]
        size = tl.cast(row_blocks, tl.int64) * N * BLOCK_M
        tl.store(partial + tl.program_id(1) * size + cell, acc, mask=(row < N)[:, None])
        last = arrive(counters + tl.program_id(0), SPLITS)
    if last:
        if SPLITS > 1:
            acc = sum_parts(partial, cell, size, (row < N)[:, None], SPLITS)
        if GROUP == 0:
            acc *= tl.load(scale + row, mask=row < N, other=0.0).to(tl.float32)[:, None]
        valid = (row < N)[:, None] & (m < M)[None, :]
        target = m[None, :].to(tl.int64) * N + row[:, None]
        acc = add_ends(acc, bias, residual, row, target, valid, N, beta, HAS_BIAS, HAS_RESIDUAL, GELU)
        tl.store(out + target, acc, mask=valid)


def serves_tiles(x: torch.Tensor, weight: torch.Tensor, bits: int, group_size: int) -> bool:
    """Tell whether shapes and dtype fit: weight rows of whole 64-byte chunks, groups of 32 columns or a multiple."""
    return (
        x.dtype in (torch.float16, torch.bfloat16)
        and weight.shape[1] % CHUNK_BYTES == 0
        and (group_size < 0 or group_size % LEAST_GROUP == 0)
        and x.data_ptr() % 16 == weight.data_ptr() % 16 == 0
    )


def launch_quantized_tiles(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    bits: int,
    group_size: int,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    beta: float,
    gelu_epilogue: bool,
    out: torch.Tensor,
    config: Tiles,
    partial: torch.Tensor,
    counters: torch.Tensor,
) -> None:
    """Compute out [M, N] = epilogue(x [M, K] W^T), ``weight`` int8 [N, K * bits / 8].

    All tensors are contiguous, ``serves_tiles`` is true, and ``config`` is of ``tiles_config``, which sees to it that
    ``partial`` (float32) and ``counters`` (int32, zero) suffice.
    """
    rows, k = x.shape
    n = weight.shape[0]
    blocks = triton.cdiv(n, config.block_n) * triton.cdiv(rows, config.block_m)
    quantized_tiles_kernel[(blocks, config.splits)](
        x,
        weight.view(torch.int16) if bits == 8 else weight,
        scale,
        scale if bias is None else bias,
        x if residual is None else residual,
        out,
        partial,
        counters,
        rows,
        n,
        float(beta),
        K=k,
        GROUP=max(group_size, 0),
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        SPLITS=config.splits,
        # Each thread asks for one row.
        PREFETCH=PREFETCH if config.block_n <= 32 * config.num_warps else 0,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        **shared_options(x, bits, bias, residual, gelu_epilogue),
    )
