"""Exact thresholds of top-k and top-p over a whole vocabulary, without a sort.

Of the few scores at the distance that holds the threshold (see ``histogram``), ``gather`` makes a list and ``settle``
finds the threshold in it.
"""

import torch
import triton
import triton.language as tl

from ..common import candidate_index, candidate_key, order_key, value_of_key, wait_for_predecessor
from ..workspace import DISTANCES, Workspace
from .greedy import LOWEST, load_scores
from .histogram import (
    ABOVE,
    BIN,
    CUT,
    FIELDS,
    FLOOR,
    GATHERED,
    LIMIT,
    TARGET,
    bin_of,
    distance_of,
    histogram_kernel,
    load_temperature,
    row_maximum,
    survey_kernel,
    weigh,
)

# Most scores gathered per row. If more share a distance, one program per row reads the whole row again and again.
MOST_GATHERED = 16384
# Parts that a round of the search tells apart.
WIDTH = 8


@triton.jit
def read_scores(scores, row, index, vocab, floor, heat, highest, limit, chosen, MASS: tl.constexpr):
    """Return keys and distances of scores, and which lie in the threshold's bin."""
    value = load_scores(scores, row, index, vocab)
    key = order_key(value)
    distance = distance_of(value / heat, highest)
    inside = (value > float("-inf")) & (key >= candidate_key(floor)) & (bin_of(distance, limit) == chosen)
    if MASS:
        inside = inside & (distance <= limit)
    return key, distance, inside


@triton.jit
def read_members(
    scores, row, vocab, floor, heat, highest, limit, chosen, gathered, count, overflows, first,
    MASS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Return keys, indices and weights of a block of members of the threshold's bin, and which of them exist.

    They come from ``gathered`` or, if that ``overflows``, from the scores.
    """
    place = first + tl.arange(0, BLOCK)
    if overflows:
        key, distance, inside = read_scores(scores, row, place, vocab, floor, heat, highest, limit, chosen, MASS)
        index = place.to(tl.int64)
    else:
        packed = tl.load(gathered + place, mask=place < count, other=LOWEST, cache_modifier=".cg")
        key, index, inside = candidate_key(packed), candidate_index(packed), place < count
        distance = distance_of(value_of_key(key) / heat, highest)
    return key, index, weigh(distance, MASS), inside


@triton.jit
def gather_kernel(
    scores,  # [B, V]
    maxima,  # int32 [B, CHUNKS]
    gathered,  # int64 [B, CAPACITY], packed candidates
    thresholds,  # int64 [B, FIELDS]
    temperature,  # float32 [B]
    vocab,  # V
    capacity,
    MASS: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNKS: tl.constexpr,
    PDL: tl.constexpr,
):
    """Gather the members of the threshold's bin, in any order, and count them."""
    row = tl.program_id(1)
    chunk = tl.program_id(0)
    wait_for_predecessor(PDL)
    record = thresholds + row.to(tl.int64) * FIELDS
    chosen = tl.load(record + BIN)
    if chosen >= 0:
        limit = tl.load(record + LIMIT).to(tl.int32).to(tl.float32, bitcast=True)
        heat = load_temperature(temperature, row)
        highest = value_of_key(row_maximum(maxima, row, tl.num_programs(0), CHUNKS)) / heat
        index = chunk * BLOCK + tl.arange(0, BLOCK)
        key, _, inside = read_scores(
            scores, row, index, vocab, tl.load(record + FLOOR), heat, highest, limit, chosen, MASS
        )
        members = tl.sum(inside.to(tl.int32), 0)
        if members > 0:
            start = tl.atomic_add(record + GATHERED, members.to(tl.int64), sem="relaxed")
            place = start + tl.cumsum(inside.to(tl.int32), 0) - 1
            packed = (key.to(tl.int64) << 32) | (0xFFFFFFFF - index.to(tl.int64))
            tl.store(gathered + row.to(tl.int64) * capacity + place, packed, mask=inside & (place < capacity))


@triton.jit
def settle_kernel(
    scores,  # [B, V]
    maxima,  # int32 [B, CHUNKS]
    gathered,  # int64 [B, CAPACITY], packed candidates
    thresholds,  # int64 [B, FIELDS]
    temperature,  # float32 [B]
    vocab,  # V
    chunks,
    capacity,
    MASS: tl.constexpr,
    INDEX_BITS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNKS: tl.constexpr,
    PDL: tl.constexpr,
):
    """Find the first of the bin's members, best first, with which their weights reach what the target lacks.

    All of equal scores pass top-k. Of those equal to the threshold of top-p as many pass as it needs, lowest index
    first. So a member's rank is its key's distance from the best key, then its index in the ``INDEX_BITS`` lowest bits,
    which are 0 for top-k.
    """
    row = tl.program_id(1)
    wait_for_predecessor(PDL)
    record = thresholds + row.to(tl.int64) * FIELDS
    chosen = tl.load(record + BIN)
    if chosen >= 0:
        floor = tl.load(record + FLOOR)
        limit = tl.load(record + LIMIT).to(tl.int32).to(tl.float32, bitcast=True)
        heat = load_temperature(temperature, row)
        highest = value_of_key(row_maximum(maxima, row, chunks, CHUNKS)) / heat
        missing = tl.load(record + TARGET) - tl.load(record + ABOVE)
        count = tl.load(record + GATHERED).to(tl.int32)
        mine = gathered + row.to(tl.int64) * capacity
        overflows = count > capacity
        length = tl.where(overflows, vocab, count)
        # Blocks are added up within threads, so that a thread's reads need not wait for the others'.
        highest_keys = tl.full([BLOCK], -0x80000000, tl.int32)
        lowest_keys = tl.full([BLOCK], 0x7FFFFFFF, tl.int32)
        for first in range(0, length, BLOCK):
            key, index, weight, inside = read_members(
                scores, row, vocab, floor, heat, highest, limit, chosen, mine, count, overflows, first, MASS, BLOCK
            )
            highest_keys = tl.maximum(highest_keys, tl.where(inside, key, -0x80000000))
            lowest_keys = tl.minimum(lowest_keys, tl.where(inside, key, 0x7FFFFFFF))
        best = tl.max(highest_keys, 0).to(tl.int64)
        # The rank is in [base, base + extent).
        base = tl.full([], 0, tl.int64)
        extent = (best - tl.min(lowest_keys, 0).to(tl.int64) + 1) << INDEX_BITS
        part = tl.arange(0, WIDTH)
        while extent > 1:
            extent = (extent + (WIDTH - 1)) // WIDTH
            pivot = base + (part + 1) * extent
            weights = tl.zeros([BLOCK, WIDTH], tl.int64)
            for first in range(0, length, BLOCK):
                key, index, weight, inside = read_members(
                    scores, row, vocab, floor, heat, highest, limit, chosen, mine, count, overflows, first, MASS, BLOCK
                )
                rank = (best - key.to(tl.int64)) << INDEX_BITS
                if INDEX_BITS > 0:
                    rank += index
                below = inside[:, None] & (rank[:, None] < pivot[None, :])
                weights += tl.where(below, weight[:, None], 0)
            reached = tl.sum(weights, 0)
            base += tl.minimum(tl.sum((reached < missing).to(tl.int64), 0), WIDTH - 1) * extent
        threshold = (best - (base >> INDEX_BITS)) << 32
        if MASS:
            last = base & ((1 << INDEX_BITS) - 1)
            tl.store(record + CUT, threshold | (0xFFFFFFFF - last))
        else:
            tl.store(record + FLOOR, threshold)


def find_thresholds(
    scores: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor | None,
    top_p: torch.Tensor | None,
    workspace: Workspace,
    chunks: int,
    options: dict,
) -> None:
    """Leave each row's thresholds of top-k and of top-p in ``workspace.thresholds``, its maxima in ``maxima``.

    Args:
        scores: [B, V]. temperature, top_k, top_p: as in ``full_sample``.
        chunks: programs per row. options: BLOCK, CHUNKS and what else all launches share.
    """
    batch, vocab = scores.shape
    grid, power = (chunks, batch), options["CHUNKS"]
    maxima, counters, thresholds = workspace.maxima, workspace.counters, workspace.thresholds
    sums, lows = workspace.chunk_sums[0], workspace.chunk_sums[1]
    gathered = workspace.candidates[batch * power :]
    capacity = min(gathered.numel() // batch, MOST_GATHERED)
    # All kernels must put a score at the same distance.
    options = {**options, "enable_fp_fusion": False}
    survey_kernel[grid](
        scores,
        maxima,
        sums,
        lows,
        workspace.histogram,
        thresholds,
        temperature,
        vocab,
        SLICE=triton.next_power_of_2(triton.cdiv(2 * DISTANCES, chunks)),
        **options,
    )
    for wanted, mass in ((top_k, False), (top_p, True)):
        if wanted is None:
            continue
        histogram_kernel[grid](
            scores,
            maxima,
            sums,
            lows,
            workspace.histogram,
            thresholds,
            counters,
            temperature,
            wanted,
            vocab,
            MASS=mass,
            **options,
        )
        gather_kernel[grid](
            scores,
            maxima,
            gathered,
            thresholds,
            temperature,
            vocab,
            capacity,
            MASS=mass,
            **options,
        )
        settle_kernel[1, batch](
            scores,
            maxima,
            gathered,
            thresholds,
            temperature,
            vocab,
            chunks,
            capacity,
            MASS=mass,
            INDEX_BITS=(vocab - 1).bit_length() if mass else 0,
            WIDTH=WIDTH,
            **(options | {"num_warps": 16}),
        )
