"""x W^T for 2 to 64 rows of x and an int8 or int4 weight, which is read once, in its stored form.

``tiles`` takes more than eight rows; this kernel is for few rows where ``few_rows`` fails its trial or finds no room.
"""

import torch
import triton
import triton.language as tl

from ..common import gelu, wait_for_predecessor
from .configs import CHUNK_BYTES, Quantized
from .launching import shared_options, words_of_rows
from .mma import multiply, unit, unpack

MOST_ROWS = 64


@triton.jit
def load_words(weight, row, chunk, lane_word, KW: tl.constexpr, EVEN: tl.constexpr):
    """Load four words per lane of a weight row; every word is used once per token, so it leaves the cache first."""
    pointers = weight + row.to(tl.int64) * KW + (chunk * 16 + lane_word)
    if EVEN:
        words = tl.load(pointers, eviction_policy="evict_first")
    else:
        words = tl.load(pointers, mask=chunk * 16 + lane_word < KW, other=0, eviction_policy="evict_first")
    return words


@triton.jit
def load_x(x, first, piece, X_WORDS: tl.constexpr, EVEN: tl.constexpr):
    if EVEN:
        block = tl.load(x + (first + 4 * piece))
    else:
        block = tl.load(x + (first + 4 * piece), mask=first + 4 * piece < X_WORDS, other=0)
    return block


@triton.jit
def add_step(
    sums,
    words_a,
    words_b,
    x,
    scale,
    sum_row,
    chunk,
    index,
    M,
    KW: tl.constexpr,
    BITS: tl.constexpr,
    BFLOAT: tl.constexpr,
    GROUP_CHUNKS: tl.constexpr,
    EVEN: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Add the products of one chunk of columns per warp to the sums (one block per eight rows of x)."""
    PIECES: tl.constexpr = 16 // BITS
    X_WORDS: tl.constexpr = KW * PIECES
    pairs_a = unpack(words_a, BITS, BFLOAT, INTERPRETED)
    pairs_b = unpack(words_b, BITS, BFLOAT, INTERPRETED)
    if GROUP_CHUNKS != 0:
        GROUPS: tl.constexpr = (KW + 15) // 16 // GROUP_CHUNKS
        group = tl.minimum(chunk // GROUP_CHUNKS, GROUPS - 1)
        group_scale = tl.load(scale + sum_row * GROUPS + group).to(tl.float32)
    x_first = chunk * (16 * PIECES) + index // 4 % 4 * (4 * PIECES) + index % 4
    new = ()
    for tile in tl.static_range(len(sums)):
        x_row = tl.minimum(tile * 8 + index // 16 % 8, M - 1)
        pieces = ()
        for piece in tl.static_range(PIECES):
            pieces = pieces + (load_x(x + x_row * X_WORDS, x_first, piece, X_WORDS, EVEN),)
        if GROUP_CHUNKS != 0:
            part = multiply(pairs_a, pairs_b, pieces, tl.zeros_like(sums[tile]), BITS, BFLOAT, INTERPRETED)
            new = new + (sums[tile] + part * group_scale,)
        else:
            new = new + (multiply(pairs_a, pairs_b, pieces, sums[tile], BITS, BFLOAT, INTERPRETED),)
    return new


@triton.jit
def quantized_matmul_kernel(
    x,  # int32 [M, K / 2], pairs of halves
    weight,  # int32 [N, KW], words of 8 / BITS * 4 integers
    scale,  # [N] or, with groups, [N, K / group size]
    bias,  # [N]
    residual,  # [M, N]
    out,  # [M, N]
    M,
    N,
    beta,
    KW: tl.constexpr,
    BITS: tl.constexpr,
    BFLOAT: tl.constexpr,
    GROUP_CHUNKS: tl.constexpr,  # chunks that share a scale, 0 for whole rows
    TILES: tl.constexpr,
    ROW_WARPS: tl.constexpr,
    COLUMN_WARPS: tl.constexpr,
    DEPTH: tl.constexpr,
    EVEN_N: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    GELU: tl.constexpr,
    PDL: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    CHUNKS: tl.constexpr = (KW + 15) // 16
    STEPS: tl.constexpr = (CHUNKS + COLUMN_WARPS - 1) // COLUMN_WARPS
    EVEN: tl.constexpr = KW == STEPS * COLUMN_WARPS * 16
    first_row = tl.program_id(0) * (16 * ROW_WARPS)
    index = tl.arange(0, 128 * ROW_WARPS * COLUMN_WARPS)
    part = index // 128 % COLUMN_WARPS
    row_a = first_row + index // (128 * COLUMN_WARPS) * 16 + index // 16 % 8
    row_b = row_a + 8
    # Lane 4 g + t of the sums has the rows g and g + 8.
    sum_row = row_a + index % 4 // 2 * 8
    if not EVEN_N:
        # Rows past the end read row N - 1 again; their results are not stored.
        row_a, row_b, sum_row = tl.minimum(row_a, N - 1), tl.minimum(row_b, N - 1), tl.minimum(sum_row, N - 1)
    lane_word = index % 16
    # The weight does not depend on the predecessor: the first steps are on their way before the wait.
    words_a, words_b = (), ()
    for step in tl.static_range(DEPTH):
        words_a = words_a + (load_words(weight, row_a, step * COLUMN_WARPS + part, lane_word, KW, EVEN),)
        words_b = words_b + (load_words(weight, row_b, step * COLUMN_WARPS + part, lane_word, KW, EVEN),)
    # Rows and columns of the sums, once the column warps' sums are added.
    warp = tl.arange(0, ROW_WARPS)[:, None, None]
    lane = tl.arange(0, 32)[None, :, None]
    place = tl.arange(0, 4)[None, None, :]
    row = first_row + warp * 16 + lane // 4 + place // 2 * 8
    m = lane % 4 * 2 + place % 2 + warp * 0
    row_scale = tl.full([ROW_WARPS, 32, 4], 1.0, tl.float32)
    if GROUP_CHUNKS == 0:
        row_scale = tl.load(scale + row, mask=row < N, other=0.0).to(tl.float32)
    bias_value = tl.zeros([ROW_WARPS, 32, 4], tl.float32)
    if HAS_BIAS:
        bias_value = tl.load(bias + row, mask=row < N, other=0.0).to(tl.float32)
    row_scale *= unit(BITS, BFLOAT, INTERPRETED)
    wait_for_predecessor(PDL)
    sums = ()
    for _ in tl.static_range(TILES):
        sums = sums + (tl.zeros([128 * ROW_WARPS * COLUMN_WARPS], tl.float32),)
    for step in range(STEPS):
        ahead = (step + DEPTH) * COLUMN_WARPS + part
        next_a = load_words(weight, row_a, ahead, lane_word, KW, False)
        next_b = load_words(weight, row_b, ahead, lane_word, KW, False)
        sums = add_step(
            sums, words_a[0], words_b[0], x, scale, sum_row, step * COLUMN_WARPS + part, index, M,
            KW, BITS, BFLOAT, GROUP_CHUNKS, EVEN, INTERPRETED,
        )  # fmt: skip
        words_a = words_a[1:] + (next_a,)
        words_b = words_b[1:] + (next_b,)
    for tile in tl.static_range(TILES):
        total = tl.sum(tl.reshape(sums[tile], [ROW_WARPS, COLUMN_WARPS, 32, 4]), 1) * row_scale + bias_value
        if GELU:
            total = gelu(total)
        valid = (row < N) & (tile * 8 + m < M)
        target = (tile * 8 + m).to(tl.int64) * N + row
        if HAS_RESIDUAL:
            total += beta * tl.load(residual + target, mask=valid, other=0.0).to(tl.float32)
        tl.store(out + target, total, mask=valid)


def serves(x: torch.Tensor, weight: torch.Tensor, bits: int, group_size: int) -> bool:
    """Tell whether shapes and dtype fit this kernel: rows of whole 64-byte chunks, groups of whole chunks."""
    chunk = CHUNK_BYTES * 8 // bits
    return (
        x.dtype in (torch.float16, torch.bfloat16)
        and x.shape[0] <= MOST_ROWS
        and weight.shape[1] % CHUNK_BYTES == 0
        and (group_size < 0 or group_size % chunk == 0)
        and x.data_ptr() % 16 == weight.data_ptr() % 16 == 0
    )


def tiles_of(rows: int) -> int:
    """Return the tiles of eight rows of x that a program takes for ``rows`` rows: 2, 4 or 8."""
    return triton.next_power_of_2(triton.cdiv(max(rows, 9), 8))


def launch_quantized_matmul(
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
    config: Quantized,
) -> None:
    """Compute out [M, N] = epilogue(x [M, K] W^T), ``weight`` int8 [N, K * bits / 8].

    All tensors are contiguous, and ``serves`` is true.
    """
    n = weight.shape[0]
    quantized_matmul_kernel[(triton.cdiv(n, 16 * config.row_warps),)](
        x.view(torch.int32),
        weight.view(torch.int32),
        scale,
        scale if bias is None else bias,
        out if residual is None else residual,
        out,
        x.shape[0],
        n,
        float(beta),
        TILES=tiles_of(x.shape[0]),
        ROW_WARPS=config.row_warps,
        COLUMN_WARPS=config.column_warps,
        DEPTH=config.depth,
        EVEN_N=n % (16 * config.row_warps) == 0,
        num_warps=config.row_warps * config.column_warps,
        **words_of_rows(weight, bits, group_size),
        **shared_options(x, bits, bias, residual, gelu_epilogue),
    )
