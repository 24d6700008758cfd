"""One row of x in the registers of the product's warps: loaded, normalised and arranged in blocks of eight steps.

One row would leave seven of the eight columns of ``mma.m16n8k16`` empty. Instead each column holds another part of the
row: of eight steps, a warp's products with the weights of step n are right in column n only, and that column is added
to the sums. So a warp keeps eight steps' x in the registers of one, for all weight rows that it takes.
"""

import triton
import triton.language as tl

from .norm import normalise, store_words
from .ptx import arrange, load_x, offset


@triton.jit
def exists(step, thread, CHUNKS: tl.constexpr, PER_WARP: tl.constexpr):
    """Tell whether a thread's warp has that step."""
    return (step < PER_WARP) & (thread // 32 * PER_WARP + step < CHUNKS)


@triton.jit
def block_pointers(x, after, block, thread, CHUNKS: tl.constexpr, BITS: tl.constexpr, PER_WARP: tl.constexpr):
    """Return where x of eight steps begins for each thread, and whether it is there: lane 4 g + t holds step g."""
    WORDS: tl.constexpr = 64 // BITS
    step = block * 8 + thread // 4 % 8
    pointers = x + ((thread // 32 * PER_WARP + step) * (4 * WORDS) + thread % 4 * WORDS + after)
    return pointers, exists(step, thread, CHUNKS, PER_WARP)


@triton.jit
def load_block(
    x, after, block, thread, CHUNKS: tl.constexpr, BITS: tl.constexpr, PER_WARP: tl.constexpr,
    INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Load x of eight steps."""
    pointers, here = block_pointers(x, after, block, thread, CHUNKS, BITS, PER_WARP)
    return load_x(pointers, here, BITS, INTERPRETED)


@triton.jit
def load_blocks(
    x, after, thread, CHUNKS: tl.constexpr, BITS: tl.constexpr, PER_WARP: tl.constexpr, INTERPRETED: tl.constexpr
):
    """Load x of all steps, in blocks of eight."""
    blocks = ()
    for block in tl.static_range((PER_WARP + 7) // 8):
        blocks = blocks + (load_block(x, after, block, thread, CHUNKS, BITS, PER_WARP, INTERPRETED),)
    return blocks


@triton.jit
def load_norm(
    gamma, shift, thread, CHUNKS: tl.constexpr, BITS: tl.constexpr, PER_WARP: tl.constexpr, INTERPRETED: tl.constexpr
):
    """Load gamma and shift of a LayerNorm in the blocks of x that they belong to."""
    gammas, shifts = (), ()
    for block in tl.static_range((PER_WARP + 7) // 8):
        gammas = gammas + (load_block(gamma, 0, block, thread, CHUNKS, BITS, PER_WARP, INTERPRETED),)
        shifts = shifts + (load_block(shift, 0, block, thread, CHUNKS, BITS, PER_WARP, INTERPRETED),)
    return gammas, shifts


@triton.jit
def only_existing(blocks, thread, CHUNKS: tl.constexpr, PER_WARP: tl.constexpr):
    """Return the blocks with 0 for the steps that a warp does not have."""
    new = ()
    for block in tl.static_range(len(blocks)):
        here = exists(block * 8 + thread // 4 % 8, thread, CHUNKS, PER_WARP)
        words = ()
        for i in tl.static_range(len(blocks[block])):
            words = words + (tl.where(here, blocks[block][i], 0),)
        new = new + (words,)
    return new


@triton.jit
def normalise_blocks(
    blocks, gammas, shifts, normed, after, epsilon, thread, KW: tl.constexpr, BITS: tl.constexpr,
    BFLOAT: tl.constexpr, WARPS: tl.constexpr, PER_WARP: tl.constexpr, STATISTICS: tl.constexpr,
    INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Return the row normalised; the first program also stores it to ``normed``."""
    CHUNKS: tl.constexpr = KW // 16
    blocks = normalise(blocks, gammas, shifts, KW * (32 // BITS), epsilon, STATISTICS, BFLOAT, INTERPRETED)
    if CHUNKS != len(blocks) * 8 * WARPS:
        # If there is no x, 0 less the mean may be infinite as a half, and times gamma's 0 that is NaN.
        blocks = only_existing(blocks, thread, CHUNKS, PER_WARP)
    if tl.program_id(0) == 0:
        for block in tl.static_range(len(blocks)):
            pointers, here = block_pointers(normed, after, block, thread, CHUNKS, BITS, PER_WARP)
            store_words(pointers, blocks[block], here)
    return blocks


@triton.jit
def arrange_blocks(blocks, less, SURPLUS: tl.constexpr, BITS: tl.constexpr, INTERPRETED: tl.constexpr):
    """Arrange all blocks; with SURPLUS, also add their negated surplus to ``less``."""
    arranged = ()
    for block in tl.static_range(len(blocks)):
        arranged = arranged + (arrange(blocks[block], BITS, INTERPRETED),)
        if SURPLUS:
            even, odd = offset(arranged[block], tl.zeros_like(less), BITS, INTERPRETED)
            less += even + odd
    return arranged, less


@triton.jit
def choose(blocks, wanted):
    """Return block number ``wanted`` of ``blocks``."""
    chosen = blocks[0]
    for block in tl.static_range(1, len(blocks)):
        words = ()
        for i in tl.static_range(len(chosen)):
            words = words + (tl.where(wanted == block, blocks[block][i], chosen[i]),)
        chosen = words
    return chosen
