"""The state of a decode step, all in device memory, and the bookkeeping at the end of a step."""

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
import triton
import triton.language as tl


class StateArguments(NamedTuple):
    """The tensors and sizes of a ``DecodeState`` as one argument of a kernel; names as there."""

    tokens: torch.Tensor
    finished: torch.Tensor
    ids: torch.Tensor
    ids_length: torch.Tensor
    cache_length: torch.Tensor
    step: torch.Tensor
    limit: torch.Tensor
    eos_ids: torch.Tensor
    seed: torch.Tensor
    lane: torch.Tensor
    ring: torch.Tensor
    turn: torch.Tensor
    pad_id: torch.Tensor
    ids_capacity: int
    ring_rows: int
    eos_count: int


@dataclass
class DecodeState:
    """The buffers of the rows in generation; samplers read and advance them.

    Every row has a state of its own: it may stand at another place than its neighbours, and end by other rules.

    Attributes:
        tokens: int64 [B], the token fed in this step, then the next one.
        finished: int32 [B], 1 once a row has produced an end token or reached its limit; from then on it gets
            ``pad_id``.
        ids: int64 [B, T], everything so far; the next token goes to column ``ids_length`` (dropped beyond T).
        ids_length, cache_length, step: int32 [B], each grows by 1 per step: ids so far, slots of the cache filled,
            tokens chosen (the counter of the row's random numbers).
        limit: int32 [B], ids at which the row ends.
        eos_ids: int64 [B, E], E >= 1, the end tokens; -1 entries match nothing.
        seed: int64 [B], lane: int32 [B]: which random numbers a row gets. Rows of one seed differ by their lanes.
        ring: int64 [R, B], pinned host memory or device memory: row turn % R receives the next tokens.
        turn: int32 [1], steps of the batch; grows by 1 per step.
        pad_id: int64 [1], token of finished rows.
        NUMBERS: the names of those that are numbers of a request or a row, and change with it.
    """

    NUMBERS: ClassVar = (
        "finished", "ids_length", "cache_length", "step", "limit", "eos_ids", "seed", "lane", "turn", "pad_id"
    )  # fmt: skip

    tokens: torch.Tensor
    finished: torch.Tensor
    ids: torch.Tensor
    ids_length: torch.Tensor
    cache_length: torch.Tensor
    step: torch.Tensor
    limit: torch.Tensor
    eos_ids: torch.Tensor
    seed: torch.Tensor
    lane: torch.Tensor
    ring: torch.Tensor
    turn: torch.Tensor
    pad_id: torch.Tensor

    def arguments(self) -> StateArguments:
        """Return the state as kernels take it."""
        return StateArguments(
            self.tokens,
            self.finished,
            self.ids,
            self.ids_length,
            self.cache_length,
            self.step,
            self.limit,
            self.eos_ids,
            self.seed,
            self.lane,
            self.ring,
            self.turn,
            self.pad_id,
            self.ids.shape[1],
            self.ring.shape[0],
            self.eos_ids.shape[1],
        )

    def eos_block(self) -> int:
        """Return a block size that holds all end tokens."""
        return triton.next_power_of_2(self.eos_ids.shape[1])


@triton.jit
def advance_row(token, row, batch, counter, state, EOS_BLOCK: tl.constexpr):
    """Record the next token of one row; the last row of the batch advances the turn.

    Args:
        token: int64, chosen for ``row``.
        counter: int32 [1], zero: rows of this step that are done.
        state: ``StateArguments``.
    """
    done = tl.load(state.finished + row)
    token = tl.where(done != 0, tl.load(state.pad_id), token).to(tl.int64)
    entry = tl.arange(0, EOS_BLOCK)
    ends = tl.load(state.eos_ids + row * state.eos_count + entry, mask=entry < state.eos_count, other=-1)
    hit = tl.sum((ends == token).to(tl.int32), 0) > 0
    count = tl.load(state.ids_length + row)
    cached = tl.load(state.cache_length + row)
    now = tl.load(state.step + row)
    hit = hit | (count + 1 >= tl.load(state.limit + row))
    turn = tl.load(state.turn)
    tl.store(state.ids + row.to(tl.int64) * state.ids_capacity + count, token, mask=count < state.ids_capacity)
    tl.store(state.ring + (turn % state.ring_rows).to(tl.int64) * batch + row, token)
    # All threads must have read the counters before one of them changes them.
    tl.debug_barrier()
    tl.store(state.finished + row, tl.where(hit, 1, done))
    tl.store(state.tokens + row, token)
    tl.store(state.ids_length + row, count + 1)
    tl.store(state.cache_length + row, cached + 1)
    tl.store(state.step + row, now + 1)
    if tl.atomic_add(counter, 1, sem="acq_rel") == batch - 1:
        tl.store(counter, 0)
        tl.store(state.turn, turn + 1)
