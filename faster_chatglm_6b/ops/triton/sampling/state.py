"""What a decode step knows and changes, all in device memory, and the bookkeeping at the end of a step."""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl


@dataclass
class DecodeState:
    """Buffers of one batch that is being generated; samplers read and advance them.

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

    def arguments(self) -> tuple:
        """The arguments of ``advance_row``, in its order."""
        return (
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
        """Block size that holds all end tokens."""
        return triton.next_power_of_2(self.eos_ids.shape[0])


@triton.jit
def advance_row(
    token,  # int64, chosen for sequence ``row``
    row,
    batch,
    counter,  # int32 [1], zero: sequences of this step that are done
    tokens,  # int64 [B]
    finished,  # int32 [B]
    ids,  # int64 [B, ids_capacity]
    ids_length,  # int32 [1]
    cache_length,  # int32 [1]
    step,  # int32 [1]
    eos_ids,  # int64 [eos_count]
    ring,  # int64 [ring_rows, B]
    pad_id,
    ids_capacity,
    ring_rows,
    eos_count,
    EOS_BLOCK: tl.constexpr,
):
    """Record the next token of one sequence; the last sequence of the batch advances the counters."""
    done = tl.load(finished + row)
    token = tl.where(done != 0, pad_id, token).to(tl.int64)
    entry = tl.arange(0, EOS_BLOCK)
    ends = tl.load(eos_ids + entry, mask=entry < eos_count, other=-1)
    hit = tl.sum((ends == token).to(tl.int32), 0) > 0
    count = tl.load(ids_length)
    now = tl.load(step)
    tl.store(finished + row, tl.where(hit, 1, done))
    tl.store(tokens + row, token)
    tl.store(ids + row.to(tl.int64) * ids_capacity + count, token, mask=count < ids_capacity)
    tl.store(ring + (now % ring_rows).to(tl.int64) * batch + row, token)
    # All threads must have read the counters before the last sequence changes them.
    tl.debug_barrier()
    if tl.atomic_add(counter, 1, sem="acq_rel") == batch - 1:
        tl.store(counter, 0)
        tl.store(ids_length, count + 1)
        tl.store(cache_length, tl.load(cache_length) + 1)
        tl.store(step, now + 1)
