"""x W^T for one row of x and an int8 or int4 weight: programs that stream weight rows through shared memory.

The weight does not depend on the kernel before, so its first rounds are under way before the wait for that kernel;
Triton's software pipelining puts their copies before the loop, and the wait stands in the first round of the loop.

One row of x would leave seven of the eight columns of ``mma.m16n8k16`` empty. Instead each column holds another part of
the row: in step n of a warp its products with the weights of that step are right in column n only, and that column is
added to the sums. So a warp keeps eight steps' x in the registers of one, for all rows that its program takes.
"""

import torch
import triton
import triton.language as tl

from .common import gelu, multiprocessor_count, pdl_options, start_successor, wait_for_predecessor
from .configs import interpreted, uses_pdl
from .quantized_configs import CHUNK_BYTES, Row
from .quantized_mma import multiply, unpack
from .quantized_offset import arrange, multiply_once, offset
from .quantized_reads import load_pieces, read_half, zero_after_wait


@triton.jit
def load_words(
    weight,
    start,
    first,
    index,
    N,
    KW: tl.constexpr,
    WARPS: tl.constexpr,
    DEPTH: tl.constexpr,
    EVEN_N: tl.constexpr,
    EVEN: tl.constexpr,
):
    """A round's words: per step four words per lane of row g and of row g + 8; ``first`` is its first step.

    Steps are constant distances from one address, which the instructions hold. Rows past the end read row N - 1; their
    results are not stored.
    """
    row = start + index // 16 % 8
    chunk = first * WARPS + index // 128
    inside = weight + (chunk * 16 + index % 16)
    words = ()
    for step in tl.static_range(DEPTH):
        pair = ()
        for block in tl.static_range(2):
            if EVEN_N:
                pointers = inside + row.to(tl.int64) * KW + (block * 8 * KW + step * WARPS * 16)
            else:
                pointers = inside + tl.minimum(row + block * 8, N - 1).to(tl.int64) * KW + step * WARPS * 16
            if EVEN:
                pair = pair + (tl.load(pointers, eviction_policy="evict_first"),)
            else:
                mask = chunk + step * WARPS < KW // 16
                pair = pair + (tl.load(pointers, mask=mask, other=0, eviction_policy="evict_first"),)
        words = words + (pair,)
    return words


@triton.jit
def load_row(
    x, after, index, KW: tl.constexpr, BITS: tl.constexpr, WARPS: tl.constexpr, BLOCKS: tl.constexpr,
    COUNTS: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """x of all steps, eight to a block: lane 4 g + t holds that of step g; for counts it is arranged."""
    PIECES: tl.constexpr = 16 // BITS
    blocks = ()
    for block in tl.static_range(BLOCKS):
        chunk = (8 * block + index // 16 % 8) * WARPS + index // 128
        pointers = x + (chunk * (16 * PIECES) + index // 4 % 4 * (4 * PIECES) + index % 4 + after)
        blocks = blocks + (load_pieces(pointers, chunk < KW // 16, BITS, INTERPRETED),)
    new = ()
    for block in tl.static_range(BLOCKS):
        pieces = ()
        for piece in tl.static_range(PIECES):
            if COUNTS:
                pieces = pieces + (arrange(blocks[block][piece], BITS, INTERPRETED),)
            else:
                pieces = pieces + (blocks[block][piece],)
        new = new + (pieces,)
    return new


@triton.jit
def no_row(zeros, BLOCKS: tl.constexpr, PIECES: tl.constexpr):
    """``load_row`` of nothing."""
    blocks = ()
    for _ in tl.static_range(BLOCKS):
        pieces = ()
        for _ in tl.static_range(PIECES):
            pieces = pieces + (zeros,)
        blocks = blocks + (pieces,)
    return blocks


@triton.jit
def choose(blocks, wanted):
    """Block number ``wanted`` of ``blocks``, each a tuple of pieces."""
    chosen = blocks[0]
    for block in tl.static_range(1, len(blocks)):
        pieces = ()
        for piece in tl.static_range(len(chosen)):
            pieces = pieces + (tl.where(wanted == block, blocks[block][piece], chosen[piece]),)
        chosen = pieces
    return chosen


@triton.jit
def add_step(
    sums, words, x, less, wanted, scales, BITS: tl.constexpr, BFLOAT: tl.constexpr, GROUPED: tl.constexpr,
    INTERPRETED: tl.constexpr,
):  # fmt: skip
    """The sums with one step's products added where ``wanted``; ``less`` and ``scales`` belong to groups."""
    if BFLOAT:
        a = unpack(words[0], BITS, True, INTERPRETED)
        b = unpack(words[1], BITS, True, INTERPRETED)
        part = multiply(a, b, x, tl.zeros_like(sums), BITS, True, INTERPRETED)
    else:
        part = multiply_once(words[0], words[1], x, BITS, INTERPRETED)
    if GROUPED:
        part = (part + less) * scales
    return tl.where(wanted, sums + part, sums)


@triton.jit
def load_parameters(scale, bias, row, N, GROUPED: tl.constexpr, HAS_BIAS: tl.constexpr):
    """Scale (1 with groups) and bias (0 without one) of the rows of a tile."""
    row_scale = tl.full(row.shape, 1.0, tl.float32)
    if not GROUPED:
        row_scale = tl.load(scale + row, mask=row < N, other=0.0)
    row_bias = tl.full(row.shape, 0.0, tl.float32)
    if HAS_BIAS:
        row_bias = tl.load(bias + row, mask=row < N, other=0.0)
    return row_scale, row_bias


@triton.jit
def quantized_row_kernel(
    x,  # int32 [K / 2], pairs of halves
    weight,  # int32 [N, KW], words of 8 / BITS * 4 integers
    scale,  # [N] or, with groups, [N, K / group size]
    bias,  # [N]
    residual,  # [N]
    out,  # [N]
    N,
    beta,
    KW: tl.constexpr,
    BITS: tl.constexpr,
    BFLOAT: tl.constexpr,
    GROUP_CHUNKS: tl.constexpr,  # chunks that share a scale, 0 for whole rows
    WARPS: tl.constexpr,
    DEPTH: tl.constexpr,  # 1, 2, 4 or 8
    STAGES: tl.constexpr,
    EVEN_N: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    GELU: tl.constexpr,
    PDL: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """A program takes 16 weight rows, a tile, at a time, every so many rows, until there are no more.

    The warps share the columns of a row in chunks of 64 bytes; step n of warp w is chunk n WARPS + w. A round is DEPTH
    steps; STAGES - 1 rounds are under way.
    """
    start_successor(PDL)
    CHUNKS: tl.constexpr = KW // 16
    STEPS: tl.constexpr = (CHUNKS + WARPS - 1) // WARPS
    ROUNDS: tl.constexpr = (STEPS + DEPTH - 1) // DEPTH
    BLOCKS: tl.constexpr = (STEPS + 7) // 8
    EVEN: tl.constexpr = CHUNKS == ROUNDS * DEPTH * WARPS
    GROUPED: tl.constexpr = GROUP_CHUNKS != 0
    GROUPS: tl.constexpr = CHUNKS // max(GROUP_CHUNKS, 1)
    COUNTS: tl.constexpr = not BFLOAT
    UNIT: tl.constexpr = 16777216.0 if COUNTS and not INTERPRETED else 1.0
    index = tl.arange(0, 128 * WARPS)
    # Of the product's columns, which are steps here, lane 4 g + t holds 2 t and 2 t + 1 of the rows g and g + 8.
    column = index % 16 // 4 * 2 + index % 2
    block_row = tl.arange(0, 16) // 2 + tl.arange(0, 16) % 2 * 8
    first = tl.program_id(0) * 16
    stride = tl.num_programs(0) * 16
    zeros = tl.zeros([128 * WARPS], tl.float32)
    sums, less, none = zeros, zeros, zeros
    after = tl.full([], 0, tl.int32)
    added = tl.zeros([16], tl.float32)
    x_row = no_row(tl.zeros([128 * WARPS], tl.int32), BLOCKS, 16 // BITS)
    next_scale, next_bias = load_parameters(scale, bias, first + block_row, N, GROUPED, HAS_BIAS)
    for round in tl.range(tl.cdiv(N - first, stride) * ROUNDS, num_stages=STAGES):
        start = first + round // ROUNDS * stride
        step_of_round = round % ROUNDS * DEPTH
        words = load_words(weight, start, step_of_round, index, N, KW, WARPS, DEPTH, EVEN_N, EVEN)
        row_scale, row_bias = next_scale, next_bias
        next_start = first + (round + 1) // ROUNDS * stride
        next_scale, next_bias = load_parameters(scale, bias, next_start + block_row, N, GROUPED, HAS_BIAS)
        if round == 0:
            wait_for_predecessor(PDL)
            if not INTERPRETED:
                after = zero_after_wait()
            x_row = load_row(x, after, index, KW, BITS, WARPS, BLOCKS, COUNTS, INTERPRETED)
            if COUNTS and not GROUPED:
                for block in tl.static_range(BLOCKS):
                    less, none = offset(x_row[block], less, none, BITS, INTERPRETED)
                less += none
            sums = less
        if HAS_RESIDUAL:
            if ROUNDS == 1 or round % ROUNDS == 0:
                here = start + block_row
                added = read_half(residual + after + tl.where(here < N, here, 0), INTERPRETED)
        x_here = choose(x_row, step_of_round // 8)
        group_less, group_scale = zeros, zeros
        if GROUPED and COUNTS:
            group_less, none = offset(x_here, zeros, zeros, BITS, INTERPRETED)
            group_less += none
        for step in tl.static_range(DEPTH):
            if GROUPED:
                sum_row = tl.minimum(start + index // 16 % 8 + index % 4 // 2 * 8, N - 1)
                chunk = (step_of_round + step) * WARPS + index // 128
                group = tl.minimum(chunk // GROUP_CHUNKS, GROUPS - 1)
                group_scale = tl.load(scale + sum_row * GROUPS + group).to(tl.float32)
            wanted = column == step_of_round % 8 + step
            sums = add_step(
                sums, words[step], x_here, group_less, wanted, group_scale, BITS, BFLOAT, GROUPED, INTERPRETED
            )
        if ROUNDS == 1 or round % ROUNDS == ROUNDS - 1:
            both = tl.permute(tl.reshape(sums, [WARPS, 8, 4, 2, 2]), [0, 1, 3, 2, 4])
            result = tl.sum(tl.reshape(tl.sum(tl.reshape(both, [WARPS, 16, 8]), 2), [WARPS, 16]), 0)
            result = result * UNIT * row_scale.to(tl.float32) + row_bias.to(tl.float32)
            if GELU:
                result = gelu(result)
            if HAS_RESIDUAL:
                result += beta * added
            out_row = start + block_row
            tl.store(out + out_row, result, mask=out_row < N)
            sums = less


def launch_quantized_row(
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
    config: Row,
) -> None:
    """out [1, N] = epilogue(x [1, K] W^T), ``weight`` int8 [N, K * bits / 8]; contiguous, ``serves`` is true.

    ``config.registers`` holds for one row of halves and one scale per weight row; the other kernels need more.
    """
    n = weight.shape[0]
    smallest = group_size < 0 and x.dtype == torch.float16
    pdl = uses_pdl(x.device)
    programs = multiprocessor_count(x.device) * config.programs
    quantized_row_kernel[(min(triton.cdiv(n, 16), programs),)](
        x.view(torch.int32),
        weight.view(torch.int32),
        scale,
        scale if bias is None else bias,
        out if residual is None else residual,
        out,
        n,
        float(beta),
        KW=weight.shape[1] // 4,
        BITS=bits,
        BFLOAT=x.dtype == torch.bfloat16,
        GROUP_CHUNKS=0 if group_size < 0 else group_size * bits // 8 // CHUNK_BYTES,
        WARPS=config.warps,
        DEPTH=config.depth,
        STAGES=config.stages,
        EVEN_N=n % 16 == 0,
        HAS_BIAS=bias is not None,
        HAS_RESIDUAL=residual is not None,
        GELU=gelu_epilogue,
        PDL=pdl,
        INTERPRETED=interpreted(),
        num_warps=config.warps,
        maxnreg=config.registers if smallest else None,
        **pdl_options(pdl),
    )
