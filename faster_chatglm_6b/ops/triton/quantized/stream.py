"""x W^T for 2 to 8 rows of x and an int8 or int4 weight: programs that stream weight rows through shared memory.

The weight does not depend on the kernel before, so its first rounds are under way before the wait for that kernel.
Triton's software pipelining puts their copies before the loop, and the wait stands in the first round of the loop.
"""

import torch
import triton
import triton.language as tl

from ..common import gelu, multiprocessor_count, pdl_options, start_successor, wait_for_predecessor
from ..configs import interpreted, uses_pdl
from .configs import CHUNK_BYTES, Stream
from .counts import multiply_counts, offset, total
from .mma import multiply, unpack
from .reads import arrange_round, load_round, no_residual, offset_round, read_residual, zero_after_wait

MOST_ROWS = 8


@triton.jit
def load_words(
    weight,
    start,
    chunk,
    index,
    N,
    KW: tl.constexpr,
    TILES: tl.constexpr,
    WARPS: tl.constexpr,
    DEPTH: tl.constexpr,
    EVEN_N: tl.constexpr,
    EVEN: tl.constexpr,
):
    """Load a round's words: per step and tile four words per lane of row g and of row g + 8.

    Steps and tiles are constant distances from one address, so the instructions hold them. Rows past the end read row
    N - 1; their results are not stored.
    """
    row = start + index // 16 % 8
    inside = weight + (chunk * 16 + index % 16)
    words = ()
    for step in tl.static_range(DEPTH):
        for block in tl.static_range(2 * TILES):
            if EVEN_N:
                pointers = inside + row.to(tl.int64) * KW + (block * 8 * KW + step * WARPS * 16)
            else:
                pointers = inside + tl.minimum(row + block * 8, N - 1).to(tl.int64) * KW + step * WARPS * 16
            if EVEN:
                words = words + (tl.load(pointers, eviction_policy="evict_first"),)
            else:
                mask = chunk + step * WARPS < (KW + 15) // 16
                words = words + (tl.load(pointers, mask=mask, other=0, eviction_policy="evict_first"),)
    return words


@triton.jit
def add_chunk(
    sums,
    words,
    x,
    scales,
    BITS: tl.constexpr,
    BFLOAT: tl.constexpr,
    GROUPED: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Add one chunk's products to the sums (chains of each tile of 16 rows).

    With groups, ``scales`` has one block per tile, and there is one chain, of finished sums.
    """
    new = ()
    if BFLOAT:
        for tile in tl.static_range(len(sums)):
            a = unpack(words[tile][0], BITS, True, INTERPRETED)
            b = unpack(words[tile][1], BITS, True, INTERPRETED)
            if GROUPED:
                part = multiply(a, b, x, tl.zeros_like(sums[tile][0]), BITS, True, INTERPRETED)
                new = new + ((sums[tile][0] + part * scales[tile],),)
            else:
                new = new + ((multiply(a, b, x, sums[tile][0], BITS, True, INTERPRETED),),)
    elif GROUPED:
        zeros = tl.zeros_like(sums[0][0])
        surplus = offset(x, zeros, zeros, BITS, INTERPRETED)
        for tile in tl.static_range(len(sums)):
            a, b = words[tile]
            part = multiply_counts(a, b, x, (zeros, zeros, zeros, zeros), BITS, INTERPRETED)
            new = new + ((sums[tile][0] + total(part, surplus, BITS, INTERPRETED) * scales[tile],),)
    else:
        for tile in tl.static_range(len(sums)):
            a, b = words[tile]
            new = new + (multiply_counts(a, b, x, sums[tile], BITS, INTERPRETED),)
    return new


@triton.jit
def no_sums(zeros, TILES: tl.constexpr, CHAINS: tl.constexpr):
    """Return the chains of each tile before the first product."""
    sums = ()
    for _ in tl.static_range(TILES):
        chains = ()
        for _ in tl.static_range(CHAINS):
            chains = chains + (zeros,)
        sums = sums + (chains,)
    return sums


@triton.jit
def load_parameters(scale, bias, row, N, TILES: tl.constexpr, GROUPED: tl.constexpr, HAS_BIAS: tl.constexpr):
    """Load scale (1 with groups) and bias (0 without one) of the rows of each tile."""
    scales, biases = (), ()
    for _ in tl.static_range(TILES):
        if GROUPED:
            scales = scales + (tl.full(row.shape, 1.0, tl.float32),)
        else:
            scales = scales + (tl.load(scale + row, mask=row < N, other=0.0),)
        if HAS_BIAS:
            biases = biases + (tl.load(bias + row, mask=row < N, other=0.0),)
        else:
            biases = biases + (tl.full(row.shape, 0.0, tl.float32),)
        row += 16
    return scales, biases


@triton.jit
def quantized_stream_kernel(
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
    WARPS: tl.constexpr,
    DEPTH: tl.constexpr,
    STAGES: tl.constexpr,
    EVEN_N: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    GELU: tl.constexpr,
    PDL: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Multiply 16 * TILES weight rows at a time, every so many rows, until there are no more.

    The warps share the columns of a row. A round is DEPTH chunks of 64 bytes per warp and row; STAGES - 1 rounds are
    under way.
    """
    start_successor(PDL)
    ROWS: tl.constexpr = 16 * TILES
    CHUNKS: tl.constexpr = (KW + 15) // 16
    ROUNDS: tl.constexpr = (CHUNKS + WARPS * DEPTH - 1) // (WARPS * DEPTH)
    EVEN: tl.constexpr = KW == ROUNDS * DEPTH * WARPS * 16
    GROUPED: tl.constexpr = GROUP_CHUNKS != 0
    GROUPS: tl.constexpr = CHUNKS // GROUP_CHUNKS if GROUPED else 1
    index = tl.arange(0, 128 * WARPS)
    part = index // 128
    # After the warps' sums are added, lane 4 g + t has the rows g and g + 8.
    entry = tl.arange(0, 128)
    block_row = entry % 32 // 4 + entry // 64 * 8
    m = entry % 4 * 2 + entry // 32 % 2
    first = tl.program_id(0) * ROWS
    stride = tl.num_programs(0) * ROWS
    zeros = tl.zeros([128 * WARPS], tl.float32)
    # Halves are multiplied with counts (see ``counts``), bfloat16 with the integers themselves.
    COUNTS: tl.constexpr = not BFLOAT
    CHAINS: tl.constexpr = 1 if BFLOAT or GROUPED else 4
    sums, less = no_sums(zeros, TILES, CHAINS), (zeros, zeros)
    after = tl.full([], 0, tl.int32)
    added = no_residual(block_row, TILES)
    x_here = no_sums(tl.zeros([128 * WARPS], tl.int32), DEPTH, 16 // BITS)
    next_scales, next_biases = load_parameters(scale, bias, first + block_row, N, TILES, GROUPED, HAS_BIAS)
    for round in tl.range(tl.cdiv(N - first, stride) * ROUNDS, num_stages=STAGES):
        start = first + round // ROUNDS * stride
        chunk = round % ROUNDS * (DEPTH * WARPS) + part
        words = load_words(weight, start, chunk, index, N, KW, TILES, WARPS, DEPTH, EVEN_N, EVEN)
        row_scales, row_biases = next_scales, next_biases
        next_start = first + (round + 1) // ROUNDS * stride
        next_scales, next_biases = load_parameters(scale, bias, next_start + block_row, N, TILES, GROUPED, HAS_BIAS)
        if round == 0:
            wait_for_predecessor(PDL)
            if not INTERPRETED:
                after = zero_after_wait()
            x_here = load_round(x, chunk + after, index, M, KW, BITS, WARPS, DEPTH, INTERPRETED)
            if ROUNDS == 1 and COUNTS:
                x_here = arrange_round(x_here, BITS, INTERPRETED)
                if not GROUPED:
                    less = offset_round(x_here, less, BITS, INTERPRETED)
        if ROUNDS > 1:
            # Read a round ahead, as it takes as long as the L2 cache does.
            next_chunk = (round + 1) % ROUNDS * (DEPTH * WARPS) + part + after
            x_next = load_round(x, next_chunk, index, M, KW, BITS, WARPS, DEPTH, INTERPRETED)
            if COUNTS:
                x_here = arrange_round(x_here, BITS, INTERPRETED)
                if not GROUPED:
                    less = offset_round(x_here, less, BITS, INTERPRETED)
        if HAS_RESIDUAL:
            if ROUNDS == 1 or round % ROUNDS == 0:
                added = read_residual(residual + after, start + block_row, m, M, N, TILES, INTERPRETED)
        for step in tl.static_range(DEPTH):
            here = chunk + step * WARPS
            used = ()
            scales = ()
            for tile in tl.static_range(TILES):
                used = used + ((words[(step * TILES + tile) * 2], words[(step * TILES + tile) * 2 + 1]),)
                if GROUPED:
                    sum_row = tl.minimum(start + tile * 16 + index // 16 % 8 + index % 4 // 2 * 8, N - 1)
                    group = tl.minimum(here // GROUP_CHUNKS, GROUPS - 1)
                    scales = scales + (tl.load(scale + sum_row * GROUPS + group).to(tl.float32),)
            sums = add_chunk(sums, used, x_here[step], scales, BITS, BFLOAT, GROUPED, INTERPRETED)
        if ROUNDS == 1 or round % ROUNDS == ROUNDS - 1:
            for tile in tl.static_range(TILES):
                both = finish(sums[tile], less, BITS, BFLOAT, GROUPED, INTERPRETED)
                # In this order the warps' sums meet without conflicts in shared memory.
                both = tl.permute(tl.reshape(both, [WARPS, 32, 4]), [0, 2, 1])
                result = tl.sum(tl.reshape(both, [WARPS, 128]), 0)
                result = result * row_scales[tile].to(tl.float32) + row_biases[tile].to(tl.float32)
                if GELU:
                    result = gelu(result)
                if HAS_RESIDUAL:
                    result += beta * added[tile]
                out_row = start + tile * 16 + block_row
                tl.store(out + m.to(tl.int64) * N + out_row, result, mask=(out_row < N) & (m < M))
            sums = no_sums(zeros, TILES, CHAINS)
            if ROUNDS > 1:
                less = (zeros, zeros)
        if ROUNDS > 1:
            x_here = x_next


@triton.jit
def finish(sums, less, BITS: tl.constexpr, BFLOAT: tl.constexpr, GROUPED: tl.constexpr, INTERPRETED: tl.constexpr):
    """Add a tile's chains up to one block of sums."""
    if GROUPED or BFLOAT:
        result = sums[0]
    else:
        result = total(sums, less, BITS, INTERPRETED)
    return result


def launch_quantized_stream(
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
    config: Stream,
) -> None:
    """Compute out [M, N] = epilogue(x [M, K] W^T), 2 <= M <= 8, ``weight`` int8 [N, K * bits / 8].

    All tensors are contiguous, and ``serves`` is true.
    """
    n = weight.shape[0]
    pdl = uses_pdl(x.device)
    programs = multiprocessor_count(x.device) * config.programs
    quantized_stream_kernel[(min(triton.cdiv(n, 16 * config.tiles), programs),)](
        x.view(torch.int32),
        weight.view(torch.int32),
        scale,
        scale if bias is None else bias,
        out if residual is None else residual,
        out,
        x.shape[0],
        n,
        float(beta),
        KW=weight.shape[1] // 4,
        BITS=bits,
        BFLOAT=x.dtype == torch.bfloat16,
        GROUP_CHUNKS=0 if group_size < 0 else group_size * bits // 8 // CHUNK_BYTES,
        TILES=config.tiles,
        WARPS=config.warps,
        DEPTH=config.depth,
        STAGES=config.stages,
        EVEN_N=n % (16 * config.tiles) == 0,
        HAS_BIAS=bias is not None,
        HAS_RESIDUAL=residual is not None,
        GELU=gelu_epilogue,
        PDL=pdl,
        INTERPRETED=interpreted(),
        num_warps=config.warps,
        **pdl_options(pdl),
    )
