"""Temperature, any top-k and any top-p over the whole vocabulary, exact and without a sort.

The k-th largest value, and the smallest value of the top-p set, are found digit by digit (radix select). Scores become
ordered 32-bit keys. Each launch adds up, per 5-bit digit below the known part, how many scores (top-k) or how much
probability (top-p) lies there. The draw is a Gumbel-max: the largest score plus noise among those kept.
"""

import torch
import triton
import triton.language as tl

from ..common import arrive, candidate_index, order_key, pack_candidate, pdl_options, value_of_key, wait_for_predecessor
from ..configs import uses_pdl
from ..workspace import Workspace, default_workspace
from .greedy import INFINITE, LOWEST, check_sampling, load_scores
from .state import DecodeState, advance_row

BLOCK = 1024
PIECE = 256
DIGITS = tl.constexpr(32)
PASSES = 7
# Values per row and pass in Workspace.thresholds.
FIELDS = tl.constexpr(4)
SLOTS = tl.constexpr(16)


@triton.jit
def unsigned_key(x):
    """Map float32 values to uint32 keys of the same order."""
    return (order_key(x) ^ -0x80000000).to(tl.uint32, bitcast=True)


@triton.jit
def row_maximum(maxima, row, chunks, CHUNKS: tl.constexpr):
    """Return ``order_key`` of the row's largest score."""
    chunk = tl.arange(0, CHUNKS)
    keys = tl.load(maxima + row.to(tl.int64) * CHUNKS + chunk, mask=chunk < chunks, other=LOWEST)
    return tl.max(keys, 0).to(tl.int32)


@triton.jit
def weigh(value, temperature, highest_key):
    """Return the unnormalised probabilities exp((value - largest) / temperature), and value / temperature.

    Temperature 0, of a row that gets its largest score, counts as 1.
    """
    temperature = tl.where(temperature > 0.0, temperature, 1.0)
    scaled = value / temperature
    highest = value_of_key(highest_key) / temperature
    return tl.where(scaled == highest, 1.0, tl.exp(scaled - highest)), scaled


@triton.jit
def choose_digit(histogram, row, chunks, prefix, above, target, share, width, relative, CHUNKS: tl.constexpr):
    """Find the digit of ``width`` bits below ``prefix`` that holds the threshold.

    Return the longer prefix, the weight strictly above it, and the target (``share`` of the total if ``relative``).
    """
    chunk = tl.arange(0, CHUNKS)
    digit = tl.arange(0, DIGITS)
    source = histogram + row.to(tl.int64) * CHUNKS * DIGITS
    weight = tl.sum(
        tl.load(source + chunk[:, None] * DIGITS + digit[None, :], mask=(chunk < chunks)[:, None], other=0.0), 0
    )
    target = tl.where(relative, share * tl.sum(weight, 0), target)
    at_least = above + tl.cumsum(weight, 0, reverse=True)
    chosen = tl.max(tl.where(at_least >= target, digit, -1), 0)
    # Rounding can leave the total of the finer digits just below the target: then take the lowest digit in use.
    lowest = tl.min(tl.where(weight > 0.0, digit, DIGITS - 1), 0)
    chosen = tl.maximum(chosen, lowest)
    above += tl.sum(tl.where(digit > chosen, weight, 0.0), 0)
    return (prefix << width.to(tl.uint32)) | chosen.to(tl.uint32), above, target


@triton.jit
def load_state(thresholds, row, slot):
    """Load prefix, above, target and floor of one row after one pass."""
    base = thresholds + row.to(tl.int64) * SLOTS * FIELDS + slot * FIELDS
    prefix = tl.load(base).to(tl.uint32, bitcast=True)
    floor = tl.load(base + 3).to(tl.uint32, bitcast=True)
    return prefix, tl.load(base + 1), tl.load(base + 2), floor


@triton.jit
def maximum_kernel(
    scores,  # [B, V]
    maxima,  # int64 [B, CHUNKS]
    vocab,  # V
    BLOCK: tl.constexpr,
    CHUNKS: tl.constexpr,
    PDL: tl.constexpr,
):
    row = tl.program_id(1)
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    wait_for_predecessor(PDL)
    key = tl.where(index < vocab, order_key(load_scores(scores, row, index, vocab)), -0x80000000)
    tl.store(maxima + row.to(tl.int64) * CHUNKS + tl.program_id(0), tl.max(key, 0).to(tl.int64))


@triton.jit(do_not_specialize=["slot", "number"])
def narrow_kernel(
    scores,  # [B, V]
    maxima,  # int64 [B, CHUNKS]
    histogram_in,  # float32 [B, CHUNKS, 32] of the pass before
    histogram_out,  # float32 [B, CHUNKS, 32]
    thresholds,  # float32 [B, 16, 4]: bits of the prefix, weight above it, target, bits of the least key allowed
    temperature,  # float32 [B]
    top_k,  # int32 [B]
    top_p,  # float32 [B]
    vocab,  # V
    slot,
    number,
    MASS: tl.constexpr,
    BLOCK: tl.constexpr,
    PIECE: tl.constexpr,
    CHUNKS: tl.constexpr,
    PDL: tl.constexpr,
):
    """Make pass ``number`` (0 to 6) towards the top-k (MASS False) or top-p threshold; ``slot`` counts both."""
    row = tl.program_id(1)
    chunk = tl.program_id(0)
    chunks = tl.num_programs(0)
    wait_for_predecessor(PDL)
    prefix = tl.full([], 0, tl.uint32)
    floor = tl.full([], 0, tl.uint32)
    above = tl.full([], 0.0, tl.float32)
    target = tl.full([], 0.0, tl.float32)
    if slot > 0:
        prefix, above, target, floor = load_state(thresholds, row, slot - 1)
        if not MASS or number == 0:
            target = tl.minimum(tl.maximum(tl.load(top_k + row), 1), vocab).to(tl.float32)
        # Pass 0 of top-p after top-k first completes the top-k threshold, which lacks two bits.
        width = tl.where(number == 0, 2, 5)
        prefix, above, target = choose_digit(
            histogram_in, row, chunks, prefix, above, target, tl.load(top_p + row), width, MASS and number == 1, CHUNKS
        )
        if number == 0:
            floor = prefix
            prefix = tl.full([], 0, tl.uint32)
            above = tl.full([], 0.0, tl.float32)
    if chunk == 0:
        base = thresholds + row.to(tl.int64) * SLOTS * FIELDS + slot * FIELDS
        tl.store(base, prefix.to(tl.float32, bitcast=True))
        tl.store(base + 1, above)
        tl.store(base + 2, target)
        tl.store(base + 3, floor.to(tl.float32, bitcast=True))
    shift = tl.where(number < 6, 27 - 5 * number, 0).to(tl.uint32)
    width = tl.where(number < 6, 5, 2).to(tl.uint32)
    # In pass 0 nothing is known yet; a shift by all 32 bits would be undefined.
    known = tl.where(number == 0, 0, shift + width).to(tl.uint32)
    bins = tl.arange(0, DIGITS).to(tl.uint32)
    heat = tl.load(temperature + row)
    highest_key = row_maximum(maxima, row, chunks, CHUNKS)
    counts = tl.zeros([PIECE, DIGITS], tl.float32)
    # In pieces, so that the block of scores times digits stays in registers.
    for piece in tl.static_range(0, BLOCK, PIECE):
        index = chunk * BLOCK + piece + tl.arange(0, PIECE)
        value = load_scores(scores, row, index, vocab)
        key = unsigned_key(value)
        inside = (index < vocab) & (key >= floor) & ((number == 0) | ((key >> known) == prefix))
        if MASS:
            weight, _ = weigh(value, heat, highest_key)
        else:
            weight = tl.full([PIECE], 1.0, tl.float32)
        weight = tl.where(inside, weight, 0.0)
        digit = (key >> shift) & ((tl.full([], 1, tl.uint32) << width) - 1)
        counts += tl.where(digit[:, None] == bins[None, :], weight[:, None], 0.0)
    tl.store(histogram_out + (row.to(tl.int64) * CHUNKS + chunk) * DIGITS + tl.arange(0, DIGITS), tl.sum(counts, 0))


@triton.jit
def gumbel(seed, step, lane, index):
    """Draw standard Gumbel noise, -log(-log(u)), one value per score (Philox 4x32-10)."""
    zero = index * 0
    number, _, _, _ = tl.philox(
        seed, index.to(tl.uint32), (zero + lane).to(tl.uint32), (zero + step).to(tl.uint32), zero.to(tl.uint32)
    )
    u = (number.to(tl.float32) + 0.5) * (1.0 / 4294967296.0)
    # -log(1 - u): the series keeps the digits of the small values, which are the ones that win.
    exponential = tl.where(u < 1e-3, u * (1.0 + u * (0.5 + u * (1.0 / 3.0))), -tl.log(1.0 - u))
    return -tl.log(exponential)


@triton.jit
def full_sample_kernel(
    scores,  # [B, V]
    maxima,  # int64 [B, CHUNKS]
    histogram,  # float32 [B, CHUNKS, 32] of the last pass
    thresholds,  # float32 [B, 16, 4]
    temperature,  # float32 [B]
    top_k,  # int32 [B]
    top_p,  # float32 [B]
    candidates,  # int64 [B, CHUNKS]
    counters,  # int32 [B + 1], zero
    vocab,  # V
    batch,  # B
    state,  # StateArguments
    last_slot,
    TOP_K: tl.constexpr,
    TOP_P: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNKS: tl.constexpr,
    EOS_BLOCK: tl.constexpr,
    INVALID_RULE: tl.constexpr,  # the token of invalid rows, or 0 for no rule
    PDL: tl.constexpr,
):
    """Complete the last threshold, draw among the scores it keeps, and advance."""
    row = tl.program_id(1)
    chunk = tl.program_id(0)
    chunks = tl.num_programs(0)
    index = chunk * BLOCK + tl.arange(0, BLOCK)
    wait_for_predecessor(PDL)
    value = load_scores(scores, row, index, vocab)
    key = unsigned_key(value)
    heat = tl.load(temperature + row)
    highest_key = row_maximum(maxima, row, chunks, CHUNKS)
    weight, scaled = weigh(value, heat, highest_key)
    kept = index < vocab
    if TOP_K or TOP_P:
        prefix, above, target, floor = load_state(thresholds, row, last_slot)
        threshold, above, target = choose_digit(
            histogram, row, chunks, prefix, above, target, 1.0, tl.full([], 2, tl.int32), False, CHUNKS
        )
        kept = kept & (key >= floor)
        if TOP_P:
            # Of the scores equal to the threshold only as many as reach top_p, lowest index first.
            tie = kept & (key == threshold)
            tie_weight = tl.max(tl.where(tie, weight, 0.0), 0)
            quota = tl.where(tie_weight > 0.0, tl.ceil((target - above) / tie_weight - 1e-4), 0.0)
            other = tl.arange(0, CHUNKS)
            digit = (threshold & 3).to(tl.int32)
            masses = tl.load(
                histogram + (row.to(tl.int64) * CHUNKS + other) * DIGITS + digit, mask=other < chunk, other=0.0
            )
            earlier = tl.sum(tl.where(tie_weight > 0.0, tl.floor(masses / tie_weight + 0.5), 0.0), 0)
            rank = earlier + tl.cumsum(tie.to(tl.float32), 0) - 1.0
            everything = tl.load(top_p + row) >= 1.0
            threshold = tl.where(everything, 0, threshold)
            quota = tl.where(everything, float("inf"), tl.maximum(quota, 1.0))
            kept = kept & ((key > threshold) | ((key == threshold) & (rank < quota)))
        else:
            kept = kept & (key >= threshold)
    lane, now = tl.load(state.lane + row), tl.load(state.step + row)
    noisy = scaled + gumbel(tl.load(state.seed + row), now, lane, index)
    if heat <= 0.0:
        noisy = value
    packed = tl.where(kept, pack_candidate(noisy, index), LOWEST)
    mine = candidates + row.to(tl.int64) * CHUNKS
    tl.store(mine + chunk, tl.max(packed, 0))
    if arrive(counters + row, chunks):
        slot = tl.arange(0, CHUNKS)
        best = tl.max(tl.load(mine + slot, mask=slot < chunks, other=LOWEST, cache_modifier=".cg"), 0)
        token = tl.minimum(candidate_index(best), vocab - 1)
        if INVALID_RULE:
            token = tl.where(highest_key >= INFINITE, INVALID_RULE, token)
        advance_row(token, row, batch, counters + batch, state, EOS_BLOCK)


def full_sample(
    scores: torch.Tensor,
    state: DecodeState,
    temperature: torch.Tensor,
    top_k: torch.Tensor | None,
    top_p: torch.Tensor | None,
    *,
    invalid_rule: bool = False,
    invalid_token: int = 5,
    workspace: Workspace | None = None,
) -> None:
    """Draw each row's next token after temperature, top-k and top-p (transformers' warpers in that order), and advance.

    It takes 2 launches, and 7 more for each of top-k and top-p. If k is at most 64 or 128, ``top_k_sample`` needs one.

    Args:
        scores: [B, V], float16, bfloat16 or float32; NaN is an error of the caller unless ``invalid_rule``.
        temperature: float32 [B]; 0 chooses the largest score.
        top_k: int32 [B], at least 1, or None: not applied. Every score equal to the k-th stays.
        top_p: float32 [B], or None: not applied. 1.0 keeps all.
        invalid_rule: choose ``invalid_token``, which is not 0, for a row that holds NaN or +inf.

    Raises:
        ValueError: a shape does not fit.
    """
    batch, vocab = scores.shape
    workspace = workspace or default_workspace(scores.device, batch)
    check_sampling(scores, state, workspace)
    block = min(BLOCK, triton.next_power_of_2(vocab))
    chunks = triton.cdiv(vocab, block)
    grid = (chunks, batch)
    power = triton.next_power_of_2(chunks)
    pdl = uses_pdl(scores.device)
    common = {"BLOCK": block, "CHUNKS": power, "PDL": pdl, "num_warps": 8, **pdl_options(pdl)}
    maxima = workspace.candidates
    histograms = workspace.histogram.view(2, -1)
    maximum_kernel[grid](scores, maxima, vocab, **common)
    passes = [(p, False) for p in range(PASSES) if top_k is not None]
    passes += [(p, True) for p in range(PASSES) if top_p is not None]
    for slot, (number, mass) in enumerate(passes):
        narrow_kernel[grid](
            scores,
            maxima,
            histograms[(slot + 1) % 2],
            histograms[slot % 2],
            workspace.thresholds,
            temperature,
            state.step if top_k is None else top_k,
            temperature if top_p is None else top_p,
            vocab,
            slot,
            number,
            MASS=mass,
            PIECE=min(PIECE, block),
            **common,
        )
    last = max(len(passes) - 1, 0)
    full_sample_kernel[grid](
        scores,
        maxima,
        histograms[last % 2],
        workspace.thresholds,
        temperature,
        state.step if top_k is None else top_k,
        temperature if top_p is None else top_p,
        workspace.candidates[batch * power :],
        workspace.counters,
        vocab,
        batch,
        state.arguments(),
        last,
        TOP_K=top_k is not None,
        TOP_P=top_p is not None,
        EOS_BLOCK=state.eos_block(),
        INVALID_RULE=invalid_token if invalid_rule else 0,
        **common,
    )
