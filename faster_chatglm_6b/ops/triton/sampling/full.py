"""Temperature, any top-k and any top-p over the whole vocabulary, exact and without a sort.

The draw is a Gumbel-max: the largest score plus noise among those that the thresholds keep.
"""

import torch
import triton
import triton.language as tl

from ...states import DecodeState
from ..common import arrive, candidate_index, order_key, pack_candidate, pdl_options, wait_for_predecessor
from ..configs import uses_pdl
from ..workspace import SAMPLING_BLOCK, Workspace, default_workspace
from .greedy import INFINITE, LOWEST, check_sampling, load_scores
from .histogram import CUT, FIELDS, FLOOR, row_maximum
from .state import advance_row
from .threshold import find_thresholds


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
    maxima,  # int32 [B, CHUNKS]
    thresholds,  # int64 [B, FIELDS]
    temperature,  # float32 [B]
    candidates,  # int64 [B, CHUNKS]
    counters,  # int32 [B + 1], zero
    vocab,  # V
    batch,  # B
    state,  # StateArguments
    THRESHOLDS: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNKS: tl.constexpr,
    EOS_BLOCK: tl.constexpr,
    INVALID_RULE: tl.constexpr,  # the token of invalid rows, or 0 for no rule
    PDL: tl.constexpr,
):
    """Draw among the scores that pass the thresholds, if there are any, and advance."""
    row = tl.program_id(1)
    chunk = tl.program_id(0)
    chunks = tl.num_programs(0)
    index = chunk * BLOCK + tl.arange(0, BLOCK)
    wait_for_predecessor(PDL)
    value = load_scores(scores, row, index, vocab)
    kept = index < vocab
    if THRESHOLDS:
        record = thresholds + row.to(tl.int64) * FIELDS
        least = tl.maximum(tl.load(record + FLOOR), tl.load(record + CUT))
        kept = kept & (pack_candidate(value, index) >= least)
    elif INVALID_RULE:
        key = tl.where(index < vocab, order_key(value), -0x80000000)
        tl.store(maxima + row.to(tl.int64) * CHUNKS + chunk, tl.max(key, 0))
    best = tl.full([], LOWEST, tl.int64)
    if tl.max(kept.to(tl.int32), 0) > 0:
        noisy = value
        if tl.load(temperature + row) > 0.0:
            lane, now = tl.load(state.lane + row), tl.load(state.step + row)
            noise = gumbel(tl.load(state.seed + row), now, lane, index)
            noisy = value / tl.load(temperature + row) + noise
        best = tl.max(tl.where(kept, pack_candidate(noisy, index), LOWEST), 0)
    mine = candidates + row.to(tl.int64) * CHUNKS
    tl.store(mine + chunk, best)
    if arrive(counters + row, chunks):
        slot = tl.arange(0, CHUNKS)
        best = tl.max(tl.load(mine + slot, mask=slot < chunks, other=LOWEST, cache_modifier=".cg"), 0)
        token = tl.minimum(candidate_index(best), vocab - 1)
        if INVALID_RULE:
            token = tl.where(row_maximum(maxima, row, chunks, CHUNKS) >= INFINITE, INVALID_RULE, token)
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

    It takes one launch; with top-k or top-p one more, and three for each of them. If k is at most 64 or 128,
    ``top_k_sample`` needs one.

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
    block = min(SAMPLING_BLOCK, triton.next_power_of_2(vocab))
    chunks = triton.cdiv(vocab, block)
    pdl = uses_pdl(scores.device)
    options = {
        "BLOCK": block,
        "CHUNKS": triton.next_power_of_2(chunks),
        "PDL": pdl,
        "num_warps": 8,
        **pdl_options(pdl),
    }
    thresholds = top_k is not None or top_p is not None
    if thresholds:
        find_thresholds(scores, temperature, top_k, top_p, workspace, chunks, options)
    full_sample_kernel[(chunks, batch)](
        scores,
        workspace.maxima,
        workspace.thresholds,
        temperature,
        workspace.candidates,
        workspace.counters,
        vocab,
        batch,
        state.arguments(),
        THRESHOLDS=thresholds,
        EOS_BLOCK=state.eos_block(),
        INVALID_RULE=invalid_token if invalid_rule else 0,
        **options,
    )
