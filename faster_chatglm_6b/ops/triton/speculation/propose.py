"""Draft the next ids of each row from what followed its last ids before, and report the turn to the host."""

import triton
import triton.language as tl

from ... import states
from ...states import FIRST_NEED, LAST_NEED, REPORT_HEAD, DecodeState, DraftState
from ..common import pdl_options, require, wait_for_predecessor
from ..configs import uses_pdl
from ..workspace import Workspace, default_workspace

BLOCK = 1024
LONGEST, SHORTEST = tl.constexpr(states.LONGEST_MATCH), tl.constexpr(states.SHORTEST_MATCH)
# A match's length and place in one number, so that the longest wins and of those the latest.
PLACES = tl.constexpr(1 << 26)
HEAD, WANTS, FINISHED = tl.constexpr(REPORT_HEAD), tl.constexpr(states.WANTS), tl.constexpr(states.FINISHED)
LONGEST_STREAK, BEST_BALANCE = tl.constexpr(states.LONGEST_STREAK), tl.constexpr(states.BEST_BALANCE)
LEAST, MOST = tl.constexpr(FIRST_NEED), tl.constexpr(LAST_NEED)


@triton.jit
def find_match(ids, first, length, BLOCK: tl.constexpr):
    """Return where the row's last ids stood before, as the column of the last of them, or -1.

    Of several places it is one with the most equal ids up to LONGEST, and of those the latest.
    """
    best = tl.full([BLOCK], -1, tl.int32)
    for start in range(first, length - 1, BLOCK):
        column = start + tl.arange(0, BLOCK)
        equal = column < length - 1
        matched = tl.zeros([BLOCK], tl.int32)
        for back in tl.static_range(LONGEST):
            newest = tl.load(ids + tl.maximum(length - 1 - back, 0))
            equal = equal & (column - back >= first)
            equal = equal & (tl.load(ids + column - back, mask=equal, other=-1) == newest)
            matched += equal.to(tl.int32)
        best = tl.maximum(best, tl.where(matched >= SHORTEST, matched * PLACES + column, -1))
    found = tl.max(best, 0)
    return tl.where(found < 0, -1, found % PLACES)


@triton.jit
def propose_kernel(
    state,  # StateArguments
    drafts,  # DraftArguments
    batch,  # B
    counter,  # int32 [1], zero
    ROWS: tl.constexpr,
    SPENT: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """Judge a row's draft by the ids that came, report them, and draft anew: one row per program."""
    row = tl.program_id(0)
    place = tl.arange(0, ROWS)
    wait_for_predecessor(PDL)
    done = tl.load(state.finished + row)
    length = tl.minimum(tl.load(state.ids_length + row), state.ids_capacity)
    seen, count = tl.load(drafts.seen + row), tl.load(drafts.count + row)
    streak, need = tl.load(drafts.streak + row), tl.load(drafts.need + row)
    balance, turn = tl.load(drafts.balance + row), tl.load(drafts.turn)
    current, now = tl.load(state.tokens + row), tl.load(state.step + row)
    ids = state.ids + row.to(tl.int64) * state.ids_capacity
    draft = tl.load(drafts.tokens + row * ROWS + place + 1, mask=place + 1 < ROWS, other=-1)
    came = seen + place < length
    fresh = tl.load(ids + seen + place, mask=came, other=-1)
    right = came & (place < count) & (fresh == draft)
    matched = tl.min(tl.where(right, ROWS, place), 0)
    if count == 0:
        streak = tl.maximum(streak - 1, 0)
    else:
        streak = tl.where(matched > 0, tl.minimum(streak + matched, LONGEST_STREAK), streak // 2)
        if SPENT:
            balance = tl.minimum(balance + 8 * matched - tl.load(drafts.price + row), BEST_BALANCE)
            need = tl.where(balance == BEST_BALANCE, LEAST, need)
            lost = balance < 0
            need = tl.where(lost, tl.minimum(2 * need, MOST), need)
            streak = tl.where(lost, 0, streak)
            balance = tl.where(lost, 0, balance)
    found = tl.where(done != 0, -1, find_match(ids, tl.load(drafts.first + row), length, BLOCK))
    # What follows a match near the end is shorter than the draft: then it repeats, as the ids do.
    period = tl.maximum(length - 1 - found, 1)
    source = found + 1 + (tl.maximum(place - 1, 0) % period)
    following = tl.load(ids + source, mask=(found >= 0) & (place > 0), other=0)
    next_tokens = tl.where((found >= 0) & (place > 0), following, current)
    wants = (found >= 0) & (streak >= need)
    flags = tl.where(wants, WANTS, 0) + tl.where(done != 0, FINISHED, 0)
    report = drafts.reports + ((turn % drafts.report_rows).to(tl.int64) * batch + row) * (HEAD + ROWS)
    # All threads must have read the numbers before one of them changes them.
    tl.debug_barrier()
    tl.store(report, (length - seen).to(tl.int64))
    tl.store(report + 1, flags.to(tl.int64))
    tl.store(report + HEAD + place, fresh)
    tl.store(drafts.tokens + row * ROWS + place, next_tokens)
    tl.store(drafts.count + row, tl.where(found >= 0, ROWS - 1, 0))
    tl.store(drafts.seen + row, length)
    tl.store(drafts.streak + row, streak)
    tl.store(drafts.need + row, need)
    tl.store(drafts.balance + row, balance)
    tl.store(drafts.steps + row * ROWS + place, now + place)
    if tl.atomic_add(counter, 1, sem="acq_rel") == batch - 1:
        tl.store(counter, 0)
        tl.store(drafts.turn, turn + 1)


def propose(state: DecodeState, drafts: DraftState, *, spent: bool, workspace: Workspace | None = None) -> None:
    """Report what a turn has brought to each row, and draft the ids after its last one.

    The draft is what followed the last place where the row's last 4 ids stood before, or its last 3 or 2. The row's
    padding is not looked at. A row asks for a step of R positions if it has a draft and those before came true, which
    also shows in steps of one token. Each such step has a price; a row that pays it in vain asks later and later.

    Args:
        state: after the turn; not changed.
        drafts: from before the turn; changed.
        spent: whether the turn computed R positions of every row.

    Raises:
        ValueError: a shape does not fit.
    """
    batch, rows = drafts.tokens.shape
    require(
        state.tokens.shape[0] == batch == drafts.reports.shape[1] and drafts.reports.shape[2] == REPORT_HEAD + rows,
        f"the state has {state.tokens.shape[0]} rows and the reports are {tuple(drafts.reports.shape)}: the drafts are "
        f"{tuple(drafts.tokens.shape)}",
    )
    workspace = workspace or default_workspace(drafts.tokens.device, batch)
    pdl = uses_pdl(drafts.tokens.device)
    propose_kernel[(batch,)](
        state.arguments(),
        drafts.arguments(),
        batch,
        workspace.counters,
        ROWS=rows,
        SPENT=spent,
        BLOCK=BLOCK,
        PDL=pdl,
        num_warps=4,
        **pdl_options(pdl),
    )
