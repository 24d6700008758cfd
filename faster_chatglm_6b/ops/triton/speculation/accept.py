"""Keep the drafted ids that the sampler chose too, and advance each row by them and one token more."""

import torch
import triton
import triton.language as tl

from ...states import DecodeState, DraftState
from ..common import pdl_options, require, wait_for_predecessor
from ..configs import uses_pdl


@triton.jit
def accept_kernel(
    sampled,  # int64 [B, ROWS]
    state,  # StateArguments
    drafts,  # DraftArguments
    ROWS: tl.constexpr,
    EOS_BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """Advance one row per program."""
    row = tl.program_id(0)
    place = tl.arange(0, ROWS)
    entry = tl.arange(0, EOS_BLOCK)
    wait_for_predecessor(PDL)
    token = tl.load(sampled + row * ROWS + place)
    draft = tl.load(drafts.tokens + row * ROWS + place + 1, mask=place + 1 < ROWS, other=-1)
    ends = tl.load(state.eos_ids + row * state.eos_count + entry, mask=entry < state.eos_count, other=-1)
    length, limit = tl.load(state.ids_length + row), tl.load(state.limit + row)
    cached, now = tl.load(state.cache_length + row), tl.load(state.step + row)
    done = tl.load(state.finished + row)
    # Position j chose the id after the first j drafted ones, which counts only if all of those were chosen.
    right = (place < tl.load(drafts.count + row)) & (token == draft)
    accepted = tl.min(tl.where(right, ROWS, place), 0)
    hit = tl.sum((token[:, None] == ends[None, :]).to(tl.int32), 1) > 0
    hit = hit | (length + place + 1 >= limit)
    end = tl.min(tl.where(hit, place, ROWS), 0)
    taken = tl.where(done != 0, 0, tl.minimum(accepted, end) + 1)
    column = length + place
    target = state.ids + row.to(tl.int64) * state.ids_capacity + column
    tl.store(target, token, mask=(place < taken) & (column < state.ids_capacity))
    last = tl.sum(tl.where(place == taken - 1, token, 0), 0)
    # All threads must have read the counters before one of them changes them.
    tl.debug_barrier()
    if taken > 0:
        tl.store(state.tokens + row, last)
        tl.store(state.finished + row, (end <= accepted).to(tl.int32))
        tl.store(state.ids_length + row, length + taken)
        tl.store(state.cache_length + row, cached + taken)
        tl.store(state.step + row, now + taken)


def accept(sampled: torch.Tensor, state: DecodeState, drafts: DraftState) -> None:
    """Append the drafted ids up to the first that was not chosen, and what was chosen there, to each row.

    A row ends at its first end token or its limit among them. Rows that are done stay as they are.

    Args:
        sampled: int64 [B * R], chosen after each of the positions in ``drafts.tokens``.
        state: advanced, but for ``ring`` and ``turn``.
        drafts: not changed.

    Raises:
        ValueError: a shape does not fit.
    """
    batch, rows = drafts.tokens.shape
    require(
        sampled.numel() == batch * rows and state.tokens.shape[0] == batch,
        f"sampled is {tuple(sampled.shape)} and the state has {state.tokens.shape[0]} rows: the drafts are "
        f"{tuple(drafts.tokens.shape)}",
    )
    pdl = uses_pdl(sampled.device)
    accept_kernel[(batch,)](
        sampled,
        state.arguments(),
        drafts.arguments(),
        ROWS=rows,
        EOS_BLOCK=state.eos_block(),
        PDL=pdl,
        num_warps=1,
        **pdl_options(pdl),
    )
