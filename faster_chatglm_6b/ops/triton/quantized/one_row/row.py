"""x W^T for one row of x and an int8 or int4 weight: programs that stream weight rows through shared memory.

The weight does not depend on the kernel before, so the first steps are under way before the wait for that kernel.

How the warps hold x is told in ``x``, how they copy and multiply in ``ptx``.
"""

import torch
import triton
import triton.language as tl

from ...common import gelu, multiprocessor_count, start_successor, wait_for_predecessor
from ..configs import CHUNK_BYTES, Row
from ..launching import shared_options, words_of_rows
from ..reads import read_half, zero_after_wait
from .norm import NormArguments, ptx_statistics
from .ptx import (
    allocate,
    arrange,
    copy_step,
    multiply_step,
    offset,
    ptx_ring,
    ptx_wait,
    read_step,
    row_sums,
    wait_for_copy,
)
from .x import arrange_blocks, choose, exists, load_block, load_blocks, load_norm, normalise_blocks

# KiB of shared memory for the ring: with Triton's own share it stays below the 48 KiB that need no request.
MOST_KIB = 47
# Words per thread of x that stay in registers; if there are more, each is read again for every tile.
MOST_WORDS_KEPT = tl.constexpr(16)


@triton.jit
def weight_pointers(weight, start, step, thread, N, KW: tl.constexpr, PER_WARP: tl.constexpr, EVEN_N: tl.constexpr):
    """Return where a thread's weights of a step are, in row g and in row g + 8 of the tile from ``start`` on.

    Rows past the end take the place of the last ones; their results are not stored.
    """
    column = (thread // 32 * PER_WARP + step) * 16 + thread % 4 * 4
    if EVEN_N:
        row = tl.minimum(start, N - 16) + thread // 4 % 8
        above = weight + row.to(tl.int64) * KW + column
        below = above + 8 * KW
    else:
        row = start + thread // 4 % 8
        above = weight + tl.minimum(row, N - 1).to(tl.int64) * KW + column
        below = weight + tl.minimum(row + 8, N - 1).to(tl.int64) * KW + column
    return above, below


@triton.jit
def copy_weights(
    place, above, below, step, wanted, thread, CHUNKS: tl.constexpr, PER_WARP: tl.constexpr, SLOT: tl.constexpr,
    EVEN: tl.constexpr,
):  # fmt: skip
    """Start copying a step's weights, or zeros if not ``wanted``."""
    if not EVEN:
        wanted = wanted & exists(step, thread, CHUNKS, PER_WARP)
    copy_step(place, place + SLOT // 2, above, below, tl.zeros_like(thread) + tl.where(wanted, 16, 0))


@triton.jit
def copy_first_turns(
    slot, weight, first, stride, turns, thread, N, KW: tl.constexpr, PER_WARP: tl.constexpr, TURNS: tl.constexpr,
    SPAN: tl.constexpr, LEAD: tl.constexpr, SLOT: tl.constexpr, EVEN: tl.constexpr, EVEN_N: tl.constexpr,
):  # fmt: skip
    """Start copying the weights of the first LEAD turns."""
    for turn in tl.static_range(LEAD):
        above, below = weight_pointers(
            weight, first + turn // TURNS * stride, turn % TURNS * SPAN, thread, N, KW, PER_WARP, EVEN_N
        )
        for n in tl.static_range(SPAN):
            copy_weights(
                slot + (turn * SPAN + n) * SLOT, above + n * 16, below + n * 16, turn % TURNS * SPAN + n,
                turn < turns, thread, KW // 16, PER_WARP, SLOT, EVEN,
            )  # fmt: skip


@triton.jit
def load_parameters(scale, bias, row, N, GROUPED: tl.constexpr, HAS_BIAS: tl.constexpr):
    """Load scale (1 with groups) and bias (0 without one) of the rows of a tile."""
    row_scale = tl.full(row.shape, 1.0, tl.float32)
    if not GROUPED:
        row_scale = tl.load(scale + row, mask=row < N, other=0.0)
    row_bias = tl.full(row.shape, 0.0, tl.float32)
    if HAS_BIAS:
        row_bias = tl.load(bias + row, mask=row < N, other=0.0)
    return row_scale, row_bias


@triton.jit
def take_words(
    place, weight, start, step, thread, N, OFFSET: tl.constexpr, KW: tl.constexpr, PER_WARP: tl.constexpr,
    SLOT: tl.constexpr, WAIT: tl.constexpr, EVEN_N: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Return a step's weights, which have been copied to ``place`` + OFFSET; the interpreter loads them here."""
    if INTERPRETED:
        above, below = weight_pointers(weight, start, step, thread, N, KW, PER_WARP, EVEN_N)
        here = exists(step, thread, KW // 16, PER_WARP)
        words = ()
        for i in tl.static_range(8):
            words = words + (tl.load((above if i < 4 else below) + i % 4, mask=here, other=0),)
    else:
        wait_for_copy(WAIT)
        words = read_step(place + OFFSET, place + OFFSET + SLOT // 2)
    return words


@triton.jit
def scale_groups(
    part, part_below, less, scale, start, step, thread, N, KW: tl.constexpr, GROUP_CHUNKS: tl.constexpr,
    PER_WARP: tl.constexpr, COUNTS: tl.constexpr,
):  # fmt: skip
    """Multiply a step's products with the scales of its group; ``less`` is the counts' negated surplus."""
    GROUPS: tl.constexpr = KW // 16 // GROUP_CHUNKS
    row = start + thread // 4 % 8
    group = tl.minimum((thread // 32 * PER_WARP + step) // GROUP_CHUNKS, GROUPS - 1)
    if COUNTS:
        part += less
        part_below += less
    part *= tl.load(scale + tl.minimum(row, N - 1) * GROUPS + group).to(tl.float32)
    part_below *= tl.load(scale + tl.minimum(row + 8, N - 1) * GROUPS + group).to(tl.float32)
    return part, part_below


@triton.jit
def store_tile(
    out, start, block_row, top, bottom, row_scale, row_bias, added, beta, N, UNIT: tl.constexpr, GELU: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Add up the sums of all warps and store a tile's results with scale, bias, GELU and residual."""
    result = row_sums(top, bottom, INTERPRETED) * UNIT * row_scale.to(tl.float32) + row_bias.to(tl.float32)
    if GELU:
        result = gelu(result)
    if HAS_RESIDUAL:
        result += beta * added
    row = start + block_row
    tl.store(out + row, result, mask=row < N)


@triton.jit
def quantized_row_kernel(
    x,  # int32 [K / 2], pairs of halves
    weight,  # int32 [N, KW], words of 8 / BITS * 4 integers
    scale,  # [N] or, with groups, [N, K / group size]
    bias,  # [N]
    residual,  # [N]
    out,  # [N]
    gamma,  # int32 [K / 2], as x
    shift,  # int32 [K / 2]
    normed,  # int32 [K / 2]
    N,
    beta,
    epsilon,
    KW: tl.constexpr,
    BITS: tl.constexpr,
    BFLOAT: tl.constexpr,
    GROUP_CHUNKS: tl.constexpr,  # chunks that share a scale, 0 for whole rows
    WARPS: tl.constexpr,
    SPAN: tl.constexpr,  # steps of a turn: 2 or 4
    LEAD: tl.constexpr,  # turns under way
    RING: tl.constexpr,  # PTX that allocates LEAD turns of all warps
    WAIT: tl.constexpr,  # PTX that waits for the oldest step of LEAD turns
    STATISTICS: tl.constexpr,  # PTX of the sums for LayerNorm, "" for none
    EVEN_N: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    GELU: tl.constexpr,
    HOLDS_BACK: tl.constexpr,
    PDL: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Multiply 16 weight rows, a tile, at a time, every so many rows, until there are no more.

    The warps share the columns of a row in chunks of 64 bytes; each takes contiguous ones, one in a step. A turn is
    SPAN steps; LEAD turns are under way.
    """
    start_successor(PDL, HOLDS_BACK)
    CHUNKS: tl.constexpr = KW // 16
    PER_WARP: tl.constexpr = (CHUNKS + WARPS - 1) // WARPS
    TURNS: tl.constexpr = (PER_WARP + SPAN - 1) // SPAN
    BLOCKS: tl.constexpr = (PER_WARP + 7) // 8
    EVEN: tl.constexpr = CHUNKS == TURNS * SPAN * WARPS
    KEPT: tl.constexpr = BLOCKS * (64 // BITS) <= MOST_WORDS_KEPT
    GROUPED: tl.constexpr = GROUP_CHUNKS != 0
    NORMALISED: tl.constexpr = STATISTICS != ""
    COUNTS: tl.constexpr = not BFLOAT
    UNIT: tl.constexpr = 16777216.0 if COUNTS and not INTERPRETED else 1.0
    SLOT: tl.constexpr = WARPS * 1024
    thread = tl.arange(0, 32 * WARPS)
    # Lanes 4 g + t of the sums have the rows g + 8 t, and nothing if t > 1.
    lane = tl.arange(0, 32)
    block_row = tl.where(lane % 4 < 2, lane // 4 + lane % 4 * 8, N)
    first = tl.program_id(0) * 16
    stride = tl.num_programs(0) * 16
    zeros = tl.zeros([32 * WARPS], tl.float32)
    turns = tl.cdiv(N - first, stride) * TURNS
    slot = thread * 16
    if not INTERPRETED:
        slot += allocate(RING)
        copy_first_turns(
            slot, weight, first, stride, turns, thread, N, KW, PER_WARP, TURNS, SPAN, LEAD, SLOT, EVEN, EVEN_N
        )
    row_scale, row_bias = load_parameters(scale, bias, first + block_row, N, GROUPED, HAS_BIAS)
    if NORMALISED:
        gammas, shifts = load_norm(gamma, shift, thread, CHUNKS, BITS, PER_WARP, INTERPRETED)
    wait_for_predecessor(PDL, HOLDS_BACK)
    after = tl.full([], 0, tl.int32)
    if not INTERPRETED:
        after = zero_after_wait()
    less = zeros
    if KEPT:
        x_row = load_blocks(x, after, thread, CHUNKS, BITS, PER_WARP, INTERPRETED)
        if NORMALISED:
            x_row = normalise_blocks(
                x_row, gammas, shifts, normed, after, epsilon, thread, KW, BITS, BFLOAT, WARPS, PER_WARP, STATISTICS,
                INTERPRETED,
            )  # fmt: skip
        x_row, less = arrange_blocks(x_row, less, COUNTS and not GROUPED, BITS, INTERPRETED)
        x_here, x_next = x_row[0], x_row[0]
    else:
        x_next = load_block(x, after, 0, thread, CHUNKS, BITS, PER_WARP, INTERPRETED)
        x_here = x_next
    top, bottom = less, less
    less_even, less_odd = zeros, zeros
    added = tl.zeros([32], tl.float32)
    for turn in tl.range(turns, num_stages=1):
        start = first + turn // TURNS * stride
        first_step = turn % TURNS * SPAN
        next_start = first + (turn + LEAD) // TURNS * stride
        next_step = (turn + LEAD) % TURNS * SPAN
        next_above, next_below = weight_pointers(weight, next_start, next_step, thread, N, KW, PER_WARP, EVEN_N)
        if KEPT:
            x_here = choose(x_row, first_step // 8)
            if COUNTS and GROUPED:
                less_even, less_odd = offset(x_here, zeros, BITS, INTERPRETED)
        elif first_step % 8 == 0:
            # Read eight steps ahead, as it takes as long as the L2 cache does.
            x_here = arrange(x_next, BITS, INTERPRETED)
            x_next = load_block(x, after, (first_step // 8 + 1) % BLOCKS, thread, CHUNKS, BITS, PER_WARP, INTERPRETED)
            if COUNTS:
                less_even, less_odd = offset(x_here, zeros, BITS, INTERPRETED)
                if not GROUPED:
                    top += less_even + less_odd
                    bottom += less_even + less_odd
        if HAS_RESIDUAL:
            if TURNS == 1 or first_step == 0:
                row = start + block_row
                added = read_half(residual + after + tl.where(row < N, row, 0), INTERPRETED)
        place = slot + turn % LEAD * (SPAN * SLOT)
        for n in tl.static_range(SPAN):
            step = first_step + n
            words = take_words(
                place, weight, start, step, thread, N, n * SLOT, KW, PER_WARP, SLOT, WAIT, EVEN_N, INTERPRETED
            )
            part, part_below = multiply_step(words, x_here, n % 2, BITS, BFLOAT, INTERPRETED)
            if not INTERPRETED:
                copy_weights(
                    place + n * SLOT, next_above + n * 16, next_below + n * 16, next_step + n, turn + LEAD < turns,
                    thread, CHUNKS, PER_WARP, SLOT, EVEN,
                )  # fmt: skip
            if GROUPED:
                part, part_below = scale_groups(
                    part, part_below, less_odd if n % 2 == 1 else less_even, scale, start, step, thread, N, KW,
                    GROUP_CHUNKS, PER_WARP, COUNTS,
                )  # fmt: skip
            wanted = thread % 4 == first_step % 8 // 2 + n // 2
            top = tl.where(wanted, top + part, top)
            bottom = tl.where(wanted, bottom + part_below, bottom)
        if TURNS == 1 or turn % TURNS == TURNS - 1:
            store_tile(
                out, start, block_row, top, bottom, row_scale, row_bias, added, beta, N, UNIT, GELU, HAS_RESIDUAL,
                INTERPRETED,
            )  # fmt: skip
            row_scale, row_bias = load_parameters(scale, bias, start + stride + block_row, N, GROUPED, HAS_BIAS)
            top, bottom = less, less


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
    norm: NormArguments | None = None,
) -> None:
    """Compute out [1, N] = epilogue(x [1, K] W^T), ``weight`` int8 [N, K * bits / 8].

    All tensors are contiguous, and ``serves`` is true. With ``norm``, for which ``normalises`` is true, x is normalised
    first.
    """
    (n, k), bfloat = (weight.shape[0], x.shape[1]), x.dtype == torch.bfloat16
    programs = multiprocessor_count(x.device) * config.programs
    span, lead = turns_under_way(config)
    quantized_row_kernel[(min(triton.cdiv(n, 16), programs),)](
        x.view(torch.int32),
        weight.view(torch.int32),
        scale,
        scale if bias is None else bias,
        out if residual is None else residual,
        out,
        *(
            [x.view(torch.int32)] * 3
            if norm is None
            else (t.view(torch.int32) for t in (norm.gamma, norm.beta, norm.out))
        ),
        n,
        float(beta),
        0.0 if norm is None else norm.epsilon,
        WARPS=config.warps,
        SPAN=span,
        LEAD=lead,
        RING=ptx_ring(config.warps * span * lead * 1024),
        WAIT=ptx_wait(span * lead),
        STATISTICS="" if norm is None else ptx_statistics(words_kept(bits, k, config.warps), config.warps, bfloat),
        EVEN_N=n % 16 == 0,
        HOLDS_BACK=config.holds_back,
        num_warps=config.warps,
        **words_of_rows(weight, bits, group_size),
        **shared_options(x, bits, bias, residual, gelu_epilogue),
    )


def words_kept(bits: int, k: int, warps: int) -> int:
    """Return the words per thread that a row of ``k`` numbers takes."""
    per_warp = -(-(k * bits // 8 // CHUNK_BYTES) // warps)
    return -(-per_warp // 8) * (64 // bits)


def normalises(bits: int, k: int, config: Row) -> bool:
    """Tell whether a LayerNorm of x, of 16 bits a number, is part of the product."""
    return config.normalises and words_kept(bits, k, config.warps) in (8, 16)


def turns_under_way(config: Row) -> tuple[int, int]:
    """Return the steps of a turn and the turns under way, as far as shared memory goes."""
    span = config.span if config.warps * config.span <= MOST_KIB else 2
    return span, min(config.lead, MOST_KIB // (config.warps * span))
