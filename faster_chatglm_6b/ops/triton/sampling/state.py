"""The bookkeeping at the end of a step, on a ``DecodeState``."""

import triton
import triton.language as tl


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
