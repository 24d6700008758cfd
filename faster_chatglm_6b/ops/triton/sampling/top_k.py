"""Temperature, top-k and top-p sampling in one launch: no sort of the vocabulary, only of a few candidates."""

import torch
import triton
import triton.language as tl

from ...states import DecodeState
from ..common import (
    arrive,
    candidate_index,
    candidate_key,
    pack_candidate,
    pdl_options,
    require,
    value_of_key,
    wait_for_predecessor,
)
from ..configs import uses_pdl
from ..workspace import Workspace, default_workspace
from .greedy import INFINITE, LOWEST, check_sampling, load_scores
from .state import advance_row

BLOCK = 2048
CAPACITIES = (64, 128)


@triton.jit
def uniform(seed, step, lane):
    """Draw a number in (0, 1) for one step of a lane (Philox 4x32-10, Salmon et al. 2011)."""
    number, _, _, _ = tl.philox(
        seed, (step * 0).to(tl.uint32), lane.to(tl.uint32), step.to(tl.uint32), (step * 0 + 1).to(tl.uint32)
    )
    return ((number >> 8).to(tl.float32) + 0.5) * (1.0 / 16777216.0)


@triton.jit
def top_k_sample_kernel(
    scores,  # [B, V]
    vocab,  # V
    batch,  # B
    temperature,  # float32 [B]
    top_k,  # int32 [B]
    top_p,  # float32 [B]
    candidates,  # int64 [B, chunks, CAPACITY]
    counters,  # int32 [B + 1], zero
    state,  # StateArguments
    BLOCK: tl.constexpr,
    CHUNKS: tl.constexpr,
    CAPACITY: tl.constexpr,
    EOS_BLOCK: tl.constexpr,
    INVALID_RULE: tl.constexpr,  # the token of invalid rows, or 0 for no rule
    PDL: tl.constexpr,
):
    """Keep the best CAPACITY candidates of each program's chunk; the last program to finish sorts those and draws."""
    row = tl.program_id(1)
    chunks = tl.num_programs(0)
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    wait_for_predecessor(PDL)
    packed = tl.where(index < vocab, pack_candidate(load_scores(scores, row, index, vocab), index), LOWEST)
    rank = tl.arange(0, CAPACITY)
    mine = candidates + row.to(tl.int64) * CHUNKS * CAPACITY
    tl.store(mine + tl.program_id(0) * CAPACITY + rank, tl.topk(packed, CAPACITY))
    if arrive(counters + row, chunks):
        slot = tl.arange(0, CHUNKS * CAPACITY)
        every = tl.load(mine + slot, mask=slot < chunks * CAPACITY, other=LOWEST, cache_modifier=".cg")
        best = tl.topk(every, CAPACITY)
        value = value_of_key(candidate_key(best))
        exists = best != LOWEST
        k = tl.maximum(tl.load(top_k + row), 1)
        # The k-th largest value; everything equal to it stays too, as in transformers' TopKLogitsWarper.
        kth = tl.min(tl.where(exists & (rank < k), candidate_key(best), 0x7FFFFFFF), 0)
        heat = tl.load(temperature + row)
        kept = exists & (candidate_key(best) >= kth) & (rank < tl.where(heat > 0.0, CAPACITY, 1))
        scaled = value / tl.where(heat > 0.0, heat, 1.0)
        highest = tl.max(tl.where(kept, scaled, float("-inf")), 0)
        mass = tl.where(kept, tl.where(scaled == highest, 1.0, tl.exp(scaled - highest)), 0.0)
        # Keep candidates while those before them hold less than top_p: the smallest set that reaches it, at least one.
        limit = tl.load(top_p + row)
        limit = tl.where(limit >= 1.0, float("inf"), limit)
        before = (tl.cumsum(mass, 0) - mass) / tl.sum(mass, 0)
        nucleus = kept & ((before < limit) | (rank == 0))
        mass = tl.where(nucleus, mass, 0.0)
        draw = uniform(tl.load(state.seed + row), tl.load(state.step + row), tl.load(state.lane + row))
        target = draw * tl.sum(mass, 0)
        chosen = tl.sum((nucleus & (tl.cumsum(mass, 0) <= target)).to(tl.int32), 0)
        chosen = tl.minimum(chosen, tl.sum((mass > 0.0).to(tl.int32), 0) - 1)
        token = tl.sum(tl.where(rank == chosen, candidate_index(best), 0), 0)
        if INVALID_RULE:
            token = tl.where(tl.max(candidate_key(best), 0) >= INFINITE, INVALID_RULE, token)
        advance_row(token, row, batch, counters + batch, state, EOS_BLOCK)


def top_k_sample(
    scores: torch.Tensor,
    state: DecodeState,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    *,
    capacity: int = 64,
    invalid_rule: bool = False,
    invalid_token: int = 5,
    workspace: Workspace | None = None,
) -> None:
    """Draw each row's next token after temperature, top-k and top-p (transformers' warpers in that order), and advance.

    Ties at the k-th value are kept as far as ``capacity`` candidates reach. The draw depends on the row's ``seed``,
    ``lane`` and ``step`` only. Parameters are device tensors, so that one captured graph serves all their values.

    Args:
        scores: [B, V], float16, bfloat16 or float32; NaN is an error of the caller unless ``invalid_rule``.
        temperature: float32 [B]; 0 chooses the largest score. top_k: int32 [B], 1 to ``capacity``.
        top_p: float32 [B]; 1.0 keeps all.
        capacity: 64 or 128.
        invalid_rule: choose ``invalid_token``, which is not 0, for a row that holds NaN or +inf.

    Raises:
        ValueError: a shape does not fit, or ``capacity`` is not one of those.
    """
    batch, vocab = scores.shape
    require(capacity in CAPACITIES, f"capacity is {capacity}; it must be one of {CAPACITIES}")
    workspace = workspace or default_workspace(scores.device, batch)
    check_sampling(scores, state, workspace)
    block = min(BLOCK, max(triton.next_power_of_2(vocab), 2 * capacity))
    chunks = triton.cdiv(vocab, block)
    pdl = uses_pdl(scores.device)
    top_k_sample_kernel[(chunks, batch)](
        scores,
        vocab,
        batch,
        temperature,
        top_k,
        top_p,
        workspace.candidates,
        workspace.counters,
        state.arguments(),
        BLOCK=block,
        CHUNKS=max(triton.next_power_of_2(chunks), 2),
        CAPACITY=capacity,
        EOS_BLOCK=state.eos_block(),
        INVALID_RULE=invalid_token if invalid_rule else 0,
        PDL=pdl,
        num_warps=16,
        **pdl_options(pdl),
    )
