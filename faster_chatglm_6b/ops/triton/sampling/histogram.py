"""How many scores, or how much probability, lie at each distance from a row's largest score.

``survey`` takes each chunk's largest score and sum of probabilities. ``histogram`` adds up by distance and finds the
one that holds the threshold. Weights are whole numbers, so that sums do not depend on the order of the additions.
"""

import triton
import triton.language as tl

from ..common import arrive, candidate_key, order_key, value_of_key, wait_for_predecessor
from ..workspace import DISTANCES
from .greedy import LOWEST, load_scores

BINS = tl.constexpr(DISTANCES)
# Places of a row in ``Workspace.thresholds``. FLOOR and CUT are packed candidates, of which the later ones are dropped.
FIELDS = tl.constexpr(8)
FLOOR, CUT, BIN, ABOVE, TARGET, GATHERED, LIMIT = (tl.constexpr(place) for place in range(7))
# The weight of the largest score; 2^17 scores of it stay below 2^63. At this distance the weight rounds to 0.
ONE = tl.constexpr(float(1 << 40))
FARTHEST = tl.constexpr(32.0)
# Rounding of the total may not ask for one score more, such as a sixth of ten equal ones for a half.
SLACK = tl.constexpr(1.0 - 2.0**-21)


@triton.jit
def load_temperature(temperature, row):
    """Load a row's temperature; 0, of a row that gets its largest score, counts as 1."""
    heat = tl.load(temperature + row)
    return tl.where(heat > 0.0, heat, 1.0)


@triton.jit
def distance_of(scaled, highest):
    """Return highest - scaled, 0 for equal infinities."""
    return tl.where(scaled == highest, 0.0, highest - scaled)


@triton.jit
def weigh(distance, MASS: tl.constexpr):
    """Return the weights of scores as int64: exp(-distance) in units of 2^-40, or 1 each."""
    if MASS:
        weight = (tl.exp(-distance) * ONE).to(tl.int64)
    else:
        weight = tl.full(distance.shape, 1, tl.int64)
    return weight


@triton.jit
def bin_of(distance, limit):
    """Return the bin of a distance: even ones up to ``limit``, which may be 0 or infinite, and the last one beyond."""
    place = tl.where(distance < limit, distance * (BINS / limit), BINS - 1.0)
    return tl.minimum(place.to(tl.int32), BINS - 1)


@triton.jit
def row_maximum(maxima, row, chunks, CHUNKS: tl.constexpr):
    """Return ``order_key`` of the row's largest score."""
    chunk = tl.arange(0, CHUNKS)
    return tl.max(tl.load(maxima + row.to(tl.int64) * CHUNKS + chunk, mask=chunk < chunks, other=-0x80000000), 0)


@triton.jit
def survey_kernel(
    scores,  # [B, V]
    maxima,  # int32 [B, CHUNKS], keys
    sums,  # float32 [B, CHUNKS], of probabilities in units of the chunk's largest
    lows,  # float32 [B, CHUNKS], the lowest finite score or +inf
    histogram,  # int64 [B, 2, BINS]
    thresholds,  # int64 [B, FIELDS]
    temperature,  # float32 [B]
    vocab,  # V
    BLOCK: tl.constexpr,
    CHUNKS: tl.constexpr,
    SLICE: tl.constexpr,
    PDL: tl.constexpr,
):
    """Survey one chunk, clear one slice of the row's histograms, and drop nothing yet."""
    row = tl.program_id(1)
    chunk = tl.program_id(0)
    index = chunk * BLOCK + tl.arange(0, BLOCK)
    wait_for_predecessor(PDL)
    value = load_scores(scores, row, index, vocab)
    highest_key = tl.max(tl.where(index < vocab, order_key(value), -0x80000000), 0)
    heat = load_temperature(temperature, row)
    near = distance_of(value / heat, value_of_key(highest_key) / heat)
    place = row.to(tl.int64) * CHUNKS + chunk
    tl.store(maxima + place, highest_key)
    tl.store(sums + place, tl.sum(tl.where(index < vocab, tl.exp(-near), 0.0), 0))
    tl.store(lows + place, tl.min(tl.where(value > float("-inf"), value, float("inf")), 0))
    entry = chunk * SLICE + tl.arange(0, SLICE)
    tl.store(histogram + row.to(tl.int64) * 2 * BINS + entry, entry.to(tl.int64) * 0, mask=entry < 2 * BINS)
    if chunk == 0:
        tl.store(thresholds + row.to(tl.int64) * FIELDS + FLOOR, LOWEST)
        tl.store(thresholds + row.to(tl.int64) * FIELDS + CUT, LOWEST)


@triton.jit
def find_bin(bins, record, goal, share, relative, limit):
    """Find the bin that holds the threshold, and record what ``settle_kernel`` needs.

    The target is ``goal``, or ``share`` of the total if ``relative``.
    """
    place = tl.arange(0, BINS)
    weight = tl.load(bins + place, cache_modifier=".cg")
    total = tl.sum(weight, 0)
    target = tl.where(relative, (share * SLACK * total.to(tl.float32)).to(tl.int64), goal)
    target = tl.minimum(tl.maximum(target, 1), total)
    chosen = tl.sum((tl.cumsum(weight, 0) < target).to(tl.int32), 0)
    tl.store(record + BIN, tl.minimum(chosen, BINS - 1).to(tl.int64))
    tl.store(record + ABOVE, tl.sum(tl.where(place < chosen, weight, 0), 0))
    tl.store(record + TARGET, target)
    tl.store(record + GATHERED, tl.full([], 0, tl.int64))
    tl.store(record + LIMIT, limit.to(tl.int32, bitcast=True).to(tl.int64))


@triton.jit
def histogram_kernel(
    scores,  # [B, V]
    maxima,  # int32 [B, CHUNKS]
    sums,  # float32 [B, CHUNKS]
    lows,  # float32 [B, CHUNKS]
    histogram,  # int64 [B, 2, BINS], zero
    thresholds,  # int64 [B, FIELDS]
    counters,  # int32 [B], zero
    temperature,  # float32 [B]
    wanted,  # int32 [B], k, or float32 [B], p
    vocab,  # V
    MASS: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNKS: tl.constexpr,
    PDL: tl.constexpr,
):
    """Add up how many scores (MASS False) or how much probability lies at each distance; find the threshold's bin.

    Top-p leaves out scores below the top-k threshold. Without one, it leaves out those that could all be dropped
    together: even ``vocab`` of them weigh less than what top-p drops. -inf never counts, so that banned tokens, which
    may be many, do not all add to one sum.
    """
    row = tl.program_id(1)
    chunk = tl.program_id(0)
    chunks = tl.num_programs(0)
    index = chunk * BLOCK + tl.arange(0, BLOCK)
    wait_for_predecessor(PDL)
    value = load_scores(scores, row, index, vocab)
    record = thresholds + row.to(tl.int64) * FIELDS
    floor = tl.load(record + FLOOR)
    heat = load_temperature(temperature, row)
    highest_key = row_maximum(maxima, row, chunks, CHUNKS)
    highest = value_of_key(highest_key) / heat
    share = tl.load(wanted + row).to(tl.float32)
    other = tl.arange(0, CHUNKS)
    others = row.to(tl.int64) * CHUNKS + other
    bounded = floor != LOWEST
    if MASS:
        everything = share >= 1.0
        peak = value_of_key(tl.load(maxima + others, mask=other < chunks, other=-0x80000000)) / heat
        part = tl.load(sums + others, mask=other < chunks, other=0.0)
        total = tl.sum(tl.where(other < chunks, part * tl.exp(-distance_of(peak, highest)), 0.0), 0)
        goal = (share * SLACK * total * ONE).to(tl.int64)
        dropped = tl.maximum((1.0 - share) * total, 1e-30)
        limit = tl.where(
            bounded, distance_of(value_of_key(candidate_key(floor)) / heat, highest), tl.log(vocab / dropped) + 0.01
        )
        limit = tl.where(limit < FARTHEST, limit, FARTHEST)
    else:
        goal = tl.maximum(tl.load(wanted + row), 1).to(tl.int64)
        everything = goal >= vocab
        low = tl.min(tl.load(lows + others, mask=other < chunks, other=float("inf")), 0)
        limit = tl.where(low < float("inf"), distance_of(low / heat, highest), 0.0)
    offset = 0
    if MASS:
        offset = BINS
    bins = histogram + (row.to(tl.int64) * 2 * BINS + offset)
    # A row that gets its largest score needs no threshold.
    if everything | (tl.load(temperature + row) <= 0.0):
        if chunk == 0:
            tl.store(record + BIN, tl.full([], -1, tl.int64))
    else:
        distance = distance_of(value / heat, highest)
        inside = (value > float("-inf")) & (order_key(value) >= candidate_key(floor))
        if MASS:
            inside = inside & (distance <= limit)
        tl.atomic_add(bins + bin_of(distance, limit), weigh(distance, MASS), mask=inside, sem="relaxed")
        if arrive(counters + row, chunks):
            find_bin(bins, record, goal, share, MASS & bounded, limit)
