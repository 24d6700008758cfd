"""x W^T for one row of x and an int8 or int4 weight: programs that stream weight rows through shared memory.

The weight does not depend on the kernel before, so the first steps are under way before the wait for that kernel.

One row of x would leave seven of the eight columns of ``mma.m16n8k16`` empty. Instead each column holds another part of
the row: of eight steps, a warp's products with the weights of step n are right in column n only, and that column is
added to the sums. So a warp keeps eight steps' x in the registers of one, for all weight rows that it takes.
"""

import torch
import triton
import triton.language as tl

from ..common import gelu, multiprocessor_count, pdl_options, start_successor, wait_for_predecessor
from ..configs import interpreted, uses_pdl
from .configs import CHUNK_BYTES, Row
from .reads import read_half, zero_after_wait
from .row_norm import LayerNorm, normalise, statistics, store_words
from .row_ptx import (
    allocate,
    arrange,
    copy_step,
    load_x,
    multiply_step,
    offset,
    read_step,
    ring,
    row_sums,
    wait,
    wait_for_copy,
)

# With what Triton adds, more than 48 KiB would need to be asked for.
MOST_KIB = 47
# Words per thread of x that stay in registers; where there are more, each is read again for every tile.
MOST_WORDS_KEPT = tl.constexpr(16)


@triton.jit
def weight_pointers(weight, start, step, thread, N, KW: tl.constexpr, PER_WARP: tl.constexpr, EVEN_N: tl.constexpr):
    """Where a thread's weights of a step are, in row g and in row g + 8 of the tile from ``start`` on.

    Past the end they are those of the last rows; their results are not stored.
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
def exists(step, thread, CHUNKS: tl.constexpr, PER_WARP: tl.constexpr):
    """Whether a thread's warp has that step."""
    return (step < PER_WARP) & (thread // 32 * PER_WARP + step < CHUNKS)


@triton.jit
def block_pointers(x, after, block, thread, CHUNKS: tl.constexpr, BITS: tl.constexpr, PER_WARP: tl.constexpr):
    """Where x of eight steps begins for each thread, and whether it is there: lane 4 g + t holds that of step g."""
    WORDS: tl.constexpr = 64 // BITS
    step = block * 8 + thread // 4 % 8
    pointers = x + ((thread // 32 * PER_WARP + step) * (4 * WORDS) + thread % 4 * WORDS + after)
    return pointers, exists(step, thread, CHUNKS, PER_WARP)


@triton.jit
def load_block(
    x, after, block, thread, CHUNKS: tl.constexpr, BITS: tl.constexpr, PER_WARP: tl.constexpr,
    INTERPRETED: tl.constexpr,
):  # fmt: skip
    """x of eight steps."""
    pointers, here = block_pointers(x, after, block, thread, CHUNKS, BITS, PER_WARP)
    return load_x(pointers, here, BITS, INTERPRETED)


@triton.jit
def only_existing(blocks, thread, CHUNKS: tl.constexpr, PER_WARP: tl.constexpr):
    """The blocks with 0 for the steps that a warp does not have."""
    new = ()
    for block in tl.static_range(len(blocks)):
        here = exists(block * 8 + thread // 4 % 8, thread, CHUNKS, PER_WARP)
        words = ()
        for i in tl.static_range(len(blocks[block])):
            words = words + (tl.where(here, blocks[block][i], 0),)
        new = new + (words,)
    return new


@triton.jit
def choose(blocks, wanted):
    """Block number ``wanted`` of ``blocks``."""
    chosen = blocks[0]
    for block in tl.static_range(1, len(blocks)):
        words = ()
        for i in tl.static_range(len(chosen)):
            words = words + (tl.where(wanted == block, blocks[block][i], chosen[i]),)
        chosen = words
    return chosen


@triton.jit
def copy_weights(
    place, above, below, step, wanted, thread, CHUNKS: tl.constexpr, PER_WARP: tl.constexpr, SLOT: tl.constexpr,
    EVEN: tl.constexpr,
):  # fmt: skip
    """Start copying a step's weights, zeros where not ``wanted``."""
    if not EVEN:
        wanted = wanted & exists(step, thread, CHUNKS, PER_WARP)
    copy_step(place, place + SLOT // 2, above, below, tl.zeros_like(thread) + tl.where(wanted, 16, 0))


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
    """A program takes 16 weight rows, a tile, at a time, every so many rows, until there are no more.

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
    GROUPS: tl.constexpr = CHUNKS // GROUP_CHUNKS if GROUPED else 1
    COUNTS: tl.constexpr = not BFLOAT
    UNIT: tl.constexpr = 16777216.0 if COUNTS and not INTERPRETED else 1.0
    SLOT: tl.constexpr = WARPS * 1024
    thread = tl.arange(0, 32 * WARPS)
    # Lanes 4 g + t of the sums have the rows g + 8 t, and nothing where t > 1.
    lane = tl.arange(0, 32)
    block_row = tl.where(lane % 4 < 2, lane // 4 + lane % 4 * 8, N)
    first = tl.program_id(0) * 16
    stride = tl.num_programs(0) * 16
    zeros = tl.zeros([32 * WARPS], tl.float32)
    turns = tl.cdiv(N - first, stride) * TURNS
    slot = thread * 16
    if not INTERPRETED:
        slot += allocate(RING)
        for turn in tl.static_range(LEAD):
            above, below = weight_pointers(
                weight, first + turn // TURNS * stride, turn % TURNS * SPAN, thread, N, KW, PER_WARP, EVEN_N
            )
            for n in tl.static_range(SPAN):
                copy_weights(
                    slot + (turn * SPAN + n) * SLOT, above + n * 16, below + n * 16, turn % TURNS * SPAN + n,
                    turn < turns, thread, CHUNKS, PER_WARP, SLOT, EVEN,
                )  # fmt: skip
    row_scale, row_bias = load_parameters(scale, bias, first + block_row, N, GROUPED, HAS_BIAS)
    NORMALISED: tl.constexpr = STATISTICS != ""
    if NORMALISED:
        gammas, shifts = (), ()
        for block in tl.static_range(BLOCKS):
            gammas = gammas + (load_block(gamma, 0, block, thread, CHUNKS, BITS, PER_WARP, INTERPRETED),)
            shifts = shifts + (load_block(shift, 0, block, thread, CHUNKS, BITS, PER_WARP, INTERPRETED),)
    wait_for_predecessor(PDL, HOLDS_BACK)
    after = tl.full([], 0, tl.int32)
    if not INTERPRETED:
        after = zero_after_wait()
    less = zeros
    if KEPT:
        x_row = ()
        for block in tl.static_range(BLOCKS):
            x_row = x_row + (load_block(x, after, block, thread, CHUNKS, BITS, PER_WARP, INTERPRETED),)
        if NORMALISED:
            x_row = normalise(x_row, gammas, shifts, KW * (32 // BITS), epsilon, STATISTICS, BFLOAT, INTERPRETED)
            if CHUNKS != BLOCKS * 8 * WARPS:
                # Where there is no x, 0 less the mean may be infinite as a half, and times gamma's 0 that is NaN.
                x_row = only_existing(x_row, thread, CHUNKS, PER_WARP)
            if tl.program_id(0) == 0:
                for block in tl.static_range(BLOCKS):
                    pointers, here = block_pointers(normed, after, block, thread, CHUNKS, BITS, PER_WARP)
                    store_words(pointers, x_row[block], here)
        arranged = ()
        for block in tl.static_range(BLOCKS):
            arranged = arranged + (arrange(x_row[block], BITS, INTERPRETED),)
            if COUNTS and not GROUPED:
                even, odd = offset(arranged[block], zeros, BITS, INTERPRETED)
                less += even + odd
        x_row = arranged
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
            if INTERPRETED:
                above, below = weight_pointers(weight, start, step, thread, N, KW, PER_WARP, EVEN_N)
                here = exists(step, thread, CHUNKS, PER_WARP)
                words = ()
                for i in tl.static_range(8):
                    words = words + (tl.load((above if i < 4 else below) + i % 4, mask=here, other=0),)
            else:
                wait_for_copy(WAIT)
                words = read_step(place + n * SLOT, place + n * SLOT + SLOT // 2)
            part, part_below = multiply_step(words, x_here, n % 2, BITS, BFLOAT, INTERPRETED)
            if not INTERPRETED:
                copy_weights(
                    place + n * SLOT, next_above + n * 16, next_below + n * 16, next_step + n, turn + LEAD < turns,
                    thread, CHUNKS, PER_WARP, SLOT, EVEN,
                )  # fmt: skip
            if GROUPED:
                row = start + thread // 4 % 8
                group = tl.minimum((thread // 32 * PER_WARP + step) // GROUP_CHUNKS, GROUPS - 1)
                if COUNTS:
                    surplus = less_odd if n % 2 == 1 else less_even
                    part += surplus
                    part_below += surplus
                part *= tl.load(scale + tl.minimum(row, N - 1) * GROUPS + group).to(tl.float32)
                part_below *= tl.load(scale + tl.minimum(row + 8, N - 1) * GROUPS + group).to(tl.float32)
            wanted = thread % 4 == first_step % 8 // 2 + n // 2
            top = tl.where(wanted, top + part, top)
            bottom = tl.where(wanted, bottom + part_below, bottom)
        if TURNS == 1 or turn % TURNS == TURNS - 1:
            result = row_sums(top, bottom, INTERPRETED) * UNIT * row_scale.to(tl.float32) + row_bias.to(tl.float32)
            if GELU:
                result = gelu(result)
            if HAS_RESIDUAL:
                result += beta * added
            out_row = start + block_row
            tl.store(out + out_row, result, mask=out_row < N)
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
    norm: LayerNorm | None = None,
) -> None:
    """out [1, N] = epilogue(x [1, K] W^T), ``weight`` int8 [N, K * bits / 8]; contiguous, ``serves`` is true.

    With ``norm``, for which ``normalises`` is true, x is normalised first.
    """
    (n, k), bfloat = (weight.shape[0], x.shape[1]), x.dtype == torch.bfloat16
    pdl = uses_pdl(x.device)
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
        KW=weight.shape[1] // 4,
        BITS=bits,
        BFLOAT=bfloat,
        GROUP_CHUNKS=0 if group_size < 0 else group_size * bits // 8 // CHUNK_BYTES,
        WARPS=config.warps,
        SPAN=span,
        LEAD=lead,
        RING=ring(config.warps * span * lead * 1024),
        WAIT=wait(span * lead),
        STATISTICS="" if norm is None else statistics(words_kept(bits, k, config.warps), config.warps, bfloat),
        EVEN_N=n % 16 == 0,
        HAS_BIAS=bias is not None,
        HAS_RESIDUAL=residual is not None,
        GELU=gelu_epilogue,
        HOLDS_BACK=config.holds_back,
        PDL=pdl,
        INTERPRETED=interpreted(),
        num_warps=config.warps,
        **pdl_options(pdl),
    )


def words_kept(bits: int, k: int, warps: int) -> int:
    """Words per thread that a row of ``k`` numbers takes."""
    per_warp = -(-(k * bits // 8 // CHUNK_BYTES) // warps)
    return -(-per_warp // 8) * (64 // bits)


def normalises(bits: int, k: int, config: Row) -> bool:
    """Whether a LayerNorm of x, of 16 bits a number, is part of the product."""
    return config.normalises and words_kept(bits, k, config.warps) in (8, 16)


def turns_under_way(config: Row) -> tuple[int, int]:
    """Steps of a turn and how many turns are under way, in what shared memory there is."""
    span = config.span if config.warps * config.span <= MOST_KIB else 2
    return span, min(config.lead, MOST_KIB // (config.warps * span))
