"""The state of a decode step, all in device memory, and the bookkeeping at the end of a step."""

from dataclasses import dataclass
from typing import NamedTuple

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
    eos_ids: torch.Tensor
    ring: torch.Tensor
    pad_id: int
    ids_capacity: int
    ring_rows: int
    eos_count: int


@dataclass
class DecodeState:
    """The buffers of one batch in generation; samplers read and advance them.

    Attributes:
        tokens: int64 [B], the token fed in this step, then the next one.
        finished: int32 [B], 1 once a sequence has produced an end token; from then on it gets ``pad_id``.
        ids: int64 [B, T], everything so far; the next token goes to column ``ids_length`` (dropped beyond T).
        ids_length, cache_length, step: int32 [1], each grows by 1 per step: ids so far, slots of the cache filled,
            steps done (counter of the random numbers, row of the ring).
        eos_ids: int64 [E], E >= 1, the end tokens; -1 entries match nothing.
        seed: int64 [1] of the random numbers.
        ring: int64 [R, B], pinned host memory or device memory: row step % R receives the next tokens.
        pad_id: token of finished sequences.
    """

    tokens: torch.Tensor
    finished: torch.Tensor
    ids: torch.Tensor
    ids_length: torch.Tensor
    cache_length: torch.Tensor
    step: torch.Tensor
    eos_ids: torch.Tensor
    seed: torch.Tensor
    ring: torch.Tensor
    pad_id: int

    def arguments(self) -> StateArguments:
        """Return the state as kernels take it."""
        return StateArguments(
            self.tokens,
            self.finished,
            self.ids,
            self.ids_length,
            self.cache_length,
            self.step,
            self.eos_ids,
            self.ring,
            self.pad_id,
            self.ids.shape[1],
            self.ring.shape[0],
            self.eos_ids.shape[0],
        )

    def eos_block(self) -> int:
        """Return a block size that holds all end tokens."""
        return triton.next_power_of_2(self.eos_ids.shape[0])


@triton.jit
def advance_row(token, row, batch, counter, state, EOS_BLOCK: tl.constexpr):
    """Record the next token of one sequence; the last sequence of the batch advances the counters.

    Args:
        token: int64, chosen for sequence ``row``.
        counter: int32 [1], zero: sequences of this step that are done.
        state: ``StateArguments``.
    """
    done = tl.load(state.finished + row)
    token = tl.where(done != 0, state.pad_id, token).to(tl.int64)
    entry = tl.arange(0, EOS_BLOCK)
    ends = tl.load(state.eos_ids + entry, mask=entry < state.eos_count, other=-1)
    hit = tl.sum((ends == token).to(tl.int32), 0) > 0
    count = tl.load(state.ids_length)
    now = tl.load(state.step)
    tl.store(state.finished + row, tl.where(hit, 1, done))
    tl.store(state.tokens + row, token)
    tl.store(state.ids + row.to(tl.int64) * state.ids_capacity + count, token, mask=count < state.ids_capacity)
    tl.store(state.ring + (now % state.ring_rows).to(tl.int64) * batch + row, token)
    # All threads must have read the counters before the last sequence changes them.
    tl.debug_barrier()
    if tl.atomic_add(counter, 1, sem="acq_rel") == batch - 1:
        tl.store(counter, 0)
        tl.store(state.ids_length, count + 1)
        tl.store(state.cache_length, tl.load(state.cache_length) + 1)
        tl.store(state.step, now + 1)
