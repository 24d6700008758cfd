"""x W^T for 2 to 8 rows of x and an int8 or int4 weight: programs that stream weight rows through shared memory.

The weight does not depend on the kernel before, so the first steps are under way before the wait for that kernel. A
program keeps its columns of all rows of x in registers, for all weight rows that it takes. Where a row is too long for
that, several programs share its columns, and the last of them adds up their sums.
"""

import torch
import triton
import triton.language as tl

from ...common import (
    arrive,
    gelu,
    multiprocessor_count,
    start_successor,
    sum_parts,
    wait_for_predecessor,
)
from ..configs import FewRows
from ..launching import shared_options, words_of_rows
from ..one_row.ptx import (
    allocate,
    arrange,
    copy_step,
    load_x,
    offset,
    ptx_ring,
    ptx_wait,
    read_step,
    wait_for_copy,
)
from ..one_row.row import load_parameters, weight_pointers
from ..reads import read_half, zero_after_wait
from .ptx import accumulate, totals

MOST_ROWS = 8
# Per thread: so two programs of 8 warps fit into a multiprocessor at once.
MOST_REGISTERS = 128


@triton.jit
def load_part(
    x, after, M, thread, chunks, XW: tl.constexpr, BITS: tl.constexpr, PER_WARP: tl.constexpr,
    INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Load and arrange x of every step of a warp: lane 4 g + t has row g, or 0 if there is no such row or step."""
    WORDS: tl.constexpr = 64 // BITS
    first = thread // 32 * PER_WARP
    row = thread // 4 % 8
    steps = ()
    for step in tl.static_range(PER_WARP):
        pointers = x + (row * XW + (first + step) * (4 * WORDS) + thread % 4 * WORDS + after)
        words = load_x(pointers, (row < M) & (first + step < chunks), BITS, INTERPRETED)
        steps = steps + (arrange(words, BITS, INTERPRETED),)
    return steps


@triton.jit
def surplus_of_each(steps, zeros, COUNTS: tl.constexpr, BITS: tl.constexpr, INTERPRETED: tl.constexpr):
    """Return the negated surplus of every step in columns 2 t and 2 t + 1."""
    found = ()
    for step in tl.static_range(len(steps)):
        if COUNTS:
            found = found + (offset(steps[step], zeros, BITS, INTERPRETED),)
        else:
            found = found + ((zeros, zeros),)
    return found


@triton.jit
def load_scales(
    scale, start, thread, first_chunk, N, STEPS: tl.constexpr, GROUPS: tl.constexpr, GROUP_CHUNKS: tl.constexpr
):
    """Load the scales of every step's group for the rows g and g + 8 of a tile; rows past the end have the last's."""
    row = start + thread // 4 % 8
    above = scale + tl.minimum(row, N - 1) * GROUPS
    below = scale + tl.minimum(row + 8, N - 1) * GROUPS
    scales = ()
    for step in tl.static_range(STEPS):
        group = tl.minimum((first_chunk + step) // GROUP_CHUNKS, GROUPS - 1)
        scales = scales + ((tl.load(above + group), tl.load(below + group)),)
    return scales


@triton.jit
def take_words(place, above, below, step, here, OTHER: tl.constexpr, WAIT: tl.constexpr, INTERPRETED: tl.constexpr):
    """Return a step's weights, which have been copied to ``place``; the interpreter loads them here."""
    if INTERPRETED:
        words = ()
        for i in tl.static_range(8):
            source = above if i < 4 else below
            words = words + (tl.load(source + (step * 16 + i % 4), mask=here, other=0),)
    else:
        wait_for_copy(WAIT)
        words = read_step(place, place + OTHER)
    return words


@triton.jit
def add_group(sums, part, surplus, scales, BITS: tl.constexpr, BFLOAT: tl.constexpr, INTERPRETED: tl.constexpr):
    """Return the sums with a step's products added, less their surplus and times the scales of their group."""
    found = totals(part, BITS, BFLOAT, INTERPRETED)
    above, below = scales[0].to(tl.float32), scales[1].to(tl.float32)
    return (
        sums[0] + (found[0] + surplus[0]) * above,
        sums[1] + (found[1] + surplus[1]) * above,
        sums[2] + (found[2] + surplus[0]) * below,
        sums[3] + (found[3] + surplus[1]) * below,
    )


@triton.jit
def store_tile(
    out, result, row, m, row_scale, row_bias, added, beta, M, N, UNIT: tl.constexpr, GELU: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
):  # fmt: skip
    """Store a tile's results with scale, bias, GELU and residual."""
    result = result * UNIT * row_scale.to(tl.float32) + row_bias.to(tl.float32)
    if GELU:
        result = gelu(result)
    if HAS_RESIDUAL:
        result += beta * added
    tl.store(out + m.to(tl.int64) * N + row, result, mask=(row < N) & (m < M))


@triton.jit
def load_addend(residual, after, row, m, M, N, INTERPRETED: tl.constexpr):
    """Load the residual of a tile; the first number stands in if there is no result."""
    target = tl.where((row < N) & (m < M), m.to(tl.int64) * N + row, 0)
    return read_half(residual + after + target, INTERPRETED)


@triton.jit
def quantized_few_rows_kernel(
    x,  # int32 [M, K / 2], pairs of halves
    weight,  # int32 [N, KW], words of 8 / BITS * 4 integers
    scale,  # [N] or, with groups, [N, K / group size]
    bias,  # [N]
    residual,  # [M, N]
    out,  # [M, N]
    partial,  # float32 [SPLITS, cdiv(N, 16), 128]
    counters,  # int32 [programs], zero
    M,
    N,
    beta,
    KW: tl.constexpr,
    BITS: tl.constexpr,
    BFLOAT: tl.constexpr,
    GROUP_CHUNKS: tl.constexpr,  # chunks that share a scale, 0 for whole rows
    WARPS: tl.constexpr,
    DEPTH: tl.constexpr,  # steps under way
    SPLITS: tl.constexpr,
    RING: tl.constexpr,  # PTX that allocates DEPTH steps of all warps
    WAIT: tl.constexpr,  # PTX that waits for the oldest of DEPTH steps
    EVEN_N: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    GELU: tl.constexpr,
    HOLDS_BACK: tl.constexpr,
    PDL: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Multiply 16 weight rows, a tile, at a time, every so many rows, until there are no more.

    SPLITS programs share the columns of a row, and the warps of each share its part, in chunks of 64 bytes. Each warp
    takes contiguous ones, one in a step.
    """
    start_successor(PDL, HOLDS_BACK)
    PART: tl.constexpr = (KW // 16 + SPLITS - 1) // SPLITS
    PER_WARP: tl.constexpr = (PART + WARPS - 1) // WARPS
    EVEN: tl.constexpr = KW == PER_WARP * WARPS * SPLITS * 16
    GROUPED: tl.constexpr = GROUP_CHUNKS != 0
    GROUPS: tl.constexpr = KW // 16 // GROUP_CHUNKS if GROUPED else 1
    COUNTS: tl.constexpr = not BFLOAT
    UNIT: tl.constexpr = 16777216.0 if COUNTS and not INTERPRETED else 1.0
    SLOT: tl.constexpr = WARPS * 1024
    split = tl.program_id(1)
    chunks = tl.minimum(KW // 16 - split * PART, PART)
    thread = tl.arange(0, 32 * WARPS)
    warp_first = thread // 32 * PER_WARP
    # After the warps' sums are added, entry 4 * lane + 2 * (odd row of x) + (row g + 8).
    entry = tl.arange(0, 128)
    block_row = entry // 16 + entry % 2 * 8
    m = entry // 4 % 4 * 2 + entry // 2 % 2
    first = tl.program_id(0) * 16
    stride = tl.num_programs(0) * 16
    zeros = tl.zeros([32 * WARPS], tl.float32)
    weight += split * (PART * 16)
    above, below = weight_pointers(weight, first, 0, thread, N, KW, PER_WARP, EVEN_N)
    slot = thread * 16
    size = tl.zeros_like(thread) + 16
    if not INTERPRETED:
        slot += allocate(RING)
        for step in tl.static_range(DEPTH):
            if not EVEN:
                size = tl.where(warp_first + step < chunks, 16, 0)
            place = slot + step * SLOT
            copy_step(place, place + SLOT // 2, above + step * 16, below + step * 16, size)
    if SPLITS == 1:
        row_scale, row_bias = load_parameters(scale, bias, first + block_row, N, GROUPED, HAS_BIAS)
    if GROUPED:
        next_scales = load_scales(scale, first, thread, split * PART + warp_first, N, PER_WARP, GROUPS, GROUP_CHUNKS)
    wait_for_predecessor(PDL, HOLDS_BACK)
    after = tl.full([], 0, tl.int32)
    if not INTERPRETED:
        after = zero_after_wait()
    x_part = load_part(
        x + split * (PART * (256 // BITS)), after, M, thread, chunks, KW * (16 // BITS), BITS, PER_WARP, INTERPRETED
    )
    surplus = surplus_of_each(x_part, zeros, COUNTS, BITS, INTERPRETED)
    even, odd = zeros, zeros
    if COUNTS and not GROUPED:
        for step in tl.static_range(PER_WARP):
            even += surplus[step][0]
            odd += surplus[step][1]
    added = tl.zeros([128], tl.float32)
    for start in tl.range(first, N, stride, num_stages=1):
        next_above, next_below = weight_pointers(weight, start + stride, 0, thread, N, KW, PER_WARP, EVEN_N)
        row = start + block_row
        if HAS_RESIDUAL and SPLITS == 1:
            added = load_addend(residual, after, row, m, M, N, INTERPRETED)
        if GROUPED:
            scales = next_scales
            # Read a tile ahead, as it takes as long as memory does.
            next_scales = load_scales(
                scale, start + stride, thread, split * PART + warp_first, N, PER_WARP, GROUPS, GROUP_CHUNKS
            )
            sums = (zeros, zeros, zeros, zeros)
        else:
            sums = (even, odd, even, odd, zeros, zeros, zeros, zeros)
        for step in tl.static_range(PER_WARP):
            place = slot + step % DEPTH * SLOT
            here = warp_first + step < chunks
            words = take_words(place, above, below, step, here, SLOT // 2, WAIT, INTERPRETED)
            if GROUPED:
                nothing = (zeros, zeros, zeros, zeros, zeros, zeros, zeros, zeros)
                part = accumulate(words, x_part[step], nothing, BITS, BFLOAT, INTERPRETED)
                sums = add_group(sums, part, surplus[step], scales[step], BITS, BFLOAT, INTERPRETED)
            else:
                sums = accumulate(words, x_part[step], sums, BITS, BFLOAT, INTERPRETED)
            if not INTERPRETED:
                ahead = step + DEPTH
                if ahead < PER_WARP:
                    if not EVEN:
                        size = tl.where(warp_first + ahead < chunks, 16, 0)
                    copy_step(place, place + SLOT // 2, above + ahead * 16, below + ahead * 16, size)
                else:
                    behind = ahead - PER_WARP
                    wanted = tl.zeros_like(thread) + (start + stride) < N
                    if not EVEN:
                        wanted = wanted & (warp_first + behind < chunks)
                    next_size = tl.where(wanted, 16, 0)
                    copy_step(place, place + SLOT // 2, next_above + behind * 16, next_below + behind * 16, next_size)
        above, below = next_above, next_below
        if not GROUPED:
            sums = totals(sums, BITS, BFLOAT, INTERPRETED)
        both = tl.join(tl.join(sums[0], sums[1]), tl.join(sums[2], sums[3]))
        result = tl.sum(tl.reshape(both, [WARPS, 128]), 0)
        if SPLITS == 1:
            store_tile(out, result, row, m, row_scale, row_bias, added, beta, M, N, UNIT, GELU, HAS_RESIDUAL)
            row_scale, row_bias = load_parameters(scale, bias, row + stride, N, GROUPED, HAS_BIAS)
        else:
            tile = split * tl.cdiv(N, 16) + start // 16
            tl.store(partial + tile.to(tl.int64) * 128 + entry, result)
    if SPLITS > 1:
        if arrive(counters + tl.program_id(0), SPLITS):
            for start in tl.range(first, N, stride, num_stages=1):
                row = start + block_row
                cell = tl.cast(start // 16, tl.int64) * 128 + entry
                result = sum_parts(partial, cell, tl.cast(tl.cdiv(N, 16), tl.int64) * 128, row >= 0, SPLITS)
                row_scale, row_bias = load_parameters(scale, bias, row, N, GROUPED, HAS_BIAS)
                if HAS_RESIDUAL:
                    added = load_addend(residual, after, row, m, M, N, INTERPRETED)
                store_tile(out, result, row, m, row_scale, row_bias, added, beta, M, N, UNIT, GELU, HAS_RESIDUAL)


def launch_quantized_few_rows(
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
    config: FewRows,
    partial: torch.Tensor,
    counters: torch.Tensor,
) -> None:
    """Compute out [M, N] = epilogue(x [M, K] W^T), 2 <= M <= 8, ``weight`` int8 [N, K * bits / 8].

    All tensors are contiguous, ``serves`` is true, and ``config`` comes from ``fit_few_rows``. If it splits the
    columns, ``partial`` (float32) needs 128 values per split and 16 weight rows, and ``counters`` (int32, zero) one per
    program.
    """
    n = weight.shape[0]
    programs = max(multiprocessor_count(x.device) * config.programs // config.splits, 1)
    quantized_few_rows_kernel[(min(triton.cdiv(n, 16), programs), config.splits)](
        x.view(torch.int32),
        weight.view(torch.int32),
        scale,
        scale if bias is None else bias,
        out if residual is None else residual,
        out,
        partial,
        counters,
        x.shape[0],
        n,
        float(beta),
        WARPS=config.warps,
        DEPTH=config.depth,
        SPLITS=config.splits,
        RING=ptx_ring(config.warps * config.depth * 1024),
        WAIT=ptx_wait(config.depth),
        EVEN_N=n % 16 == 0,
        HOLDS_BACK=config.holds_back,
        num_warps=config.warps,
        **_register_options(config, group_size),
        **words_of_rows(weight, bits, group_size),
        **shared_options(x, bits, bias, residual, gelu_epilogue),
    )


def _register_options(config: FewRows, group_size: int) -> dict:
    """Return the launch options that leave room for a second program; with groups too many registers would spill."""
    return {"maxnreg": MOST_REGISTERS} if config.warps == 8 and config.programs > 1 and group_size < 0 else {}
