"""The likeliest token per sequence, in one launch."""

import torch
import triton
import triton.language as tl

from ...states import DecodeState
from ..common import arrive, candidate_index, candidate_key, pack_candidate, pdl_options, require, wait_for_predecessor
from ..configs import uses_pdl
from ..workspace import SAMPLING_BLOCK, Workspace, default_workspace
from .state import advance_row

# order_key(+inf): a row whose largest key reaches it holds +inf or NaN.
INFINITE = tl.constexpr(0x7F800000)
LOWEST = tl.constexpr(-(2**63))


@triton.jit
def load_scores(scores, row, index, vocab):
    """Load one row's scores as float32, -inf past the end."""
    return tl.load(scores + row.to(tl.int64) * vocab + index, mask=index < vocab, other=float("-inf")).to(tl.float32)


@triton.jit
def greedy_sample_kernel(
    scores,  # [B, V]
    vocab,  # V
    batch,  # B
    candidates,  # int64 [B, chunks]
    counters,  # int32 [B + 1], zero
    state,  # StateArguments
    BLOCK: tl.constexpr,
    CHUNKS: tl.constexpr,
    EOS_BLOCK: tl.constexpr,
    INVALID_RULE: tl.constexpr,  # the token of invalid rows, or 0 for no rule
    PDL: tl.constexpr,
):
    row = tl.program_id(1)
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    wait_for_predecessor(PDL)
    packed = tl.where(index < vocab, pack_candidate(load_scores(scores, row, index, vocab), index), LOWEST)
    mine = candidates + row.to(tl.int64) * CHUNKS
    tl.store(mine + tl.program_id(0), tl.max(packed, 0))
    if arrive(counters + row, tl.num_programs(0)):
        chunk = tl.arange(0, CHUNKS)
        best = tl.max(tl.load(mine + chunk, mask=chunk < tl.num_programs(0), other=LOWEST, cache_modifier=".cg"), 0)
        token = candidate_index(best)
        if INVALID_RULE:
            token = tl.where(candidate_key(best) >= INFINITE, INVALID_RULE, token)
        advance_row(token, row, batch, counters + batch, state, EOS_BLOCK)


def check_sampling(scores: torch.Tensor, state: DecodeState, workspace: Workspace) -> None:
    """Raise ValueError unless scores [B, V] fit the state and the workspace."""
    batch, vocab = scores.shape
    require(scores.is_contiguous(), "scores must be contiguous")
    require(
        state.tokens.shape[0] == batch == state.ring.shape[1],
        f"scores has {batch} rows but the state holds {state.tokens.shape[0]} sequences",
    )
    require(
        workspace.batch >= batch and workspace.chunks * SAMPLING_BLOCK >= vocab,
        f"the workspace was made for {workspace.batch} sequences and a vocabulary of at most "
        f"{workspace.chunks * SAMPLING_BLOCK}; scores is {tuple(scores.shape)}",
    )


def greedy_sample(
    scores: torch.Tensor,
    state: DecodeState,
    *,
    invalid_rule: bool = False,
    invalid_token: int = 5,
    workspace: Workspace | None = None,
) -> None:
    """Choose each row's largest score (lowest index on ties; NaN is largest, as in ``torch.argmax``) and advance.

    Args:
        scores: [B, V], float16, bfloat16 or float32.
        invalid_rule: choose ``invalid_token``, which is not 0, for a row that holds NaN or +inf.

    Raises:
        ValueError: a shape does not fit.
    """
    batch, vocab = scores.shape
    workspace = workspace or default_workspace(scores.device, batch)
    check_sampling(scores, state, workspace)
    chunks = triton.cdiv(vocab, SAMPLING_BLOCK)
    pdl = uses_pdl(scores.device)
    greedy_sample_kernel[(chunks, batch)](
        scores,
        vocab,
        batch,
        workspace.candidates,
        workspace.counters,
        state.arguments(),
        BLOCK=SAMPLING_BLOCK,
        CHUNKS=triton.next_power_of_2(chunks),
        EOS_BLOCK=state.eos_block(),
        INVALID_RULE=invalid_token if invalid_rule else 0,
        PDL=pdl,
        num_warps=4,
        **pdl_options(pdl),
    )
