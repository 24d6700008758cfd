"""Draft the next ids of each row from its own ids, and keep those that the sampler chose too."""

from typing import Any

import numpy as np
import torch

from ...states import (
    BEST_BALANCE,
    FINISHED,
    FIRST_NEED,
    LAST_NEED,
    LONGEST_MATCH,
    LONGEST_STREAK,
    REPORT_HEAD,
    SHORTEST_MATCH,
    WANTS,
    DecodeState,
    DraftState,
)


def accept(sampled: torch.Tensor, state: DecodeState, drafts: DraftState) -> None:
    """Append the drafted ids up to the first that was not chosen, and what was chosen there, to each row.

    Arguments and meaning are those of ``triton.accept``.
    """
    batch, rows = drafts.tokens.shape
    chosen, drafted = sampled.view(batch, rows).tolist(), drafts.tokens.tolist()
    for row in range(batch):
        if state.finished[row]:
            continue
        length, limit = int(state.ids_length[row]), int(state.limit[row])
        ends, count = set(state.eos_ids[row].tolist()), int(drafts.count[row])
        taken, is_end = 0, False
        while taken < rows and not is_end:
            token = chosen[row][taken]
            taken += 1
            is_end = token in ends or length + taken >= limit
            if taken > count or taken == rows or token != drafted[row][taken]:
                break
        tokens = torch.tensor(chosen[row][:taken], device="cpu")
        place = state.ids[row, length : length + taken]
        place.copy_(tokens[: len(place)])
        state.tokens[row], state.finished[row] = tokens[-1], int(is_end)
        for counter in (state.ids_length, state.cache_length, state.step):
            counter[row] += taken


def propose(state: DecodeState, drafts: DraftState, *, spent: bool, workspace: Any = None) -> None:
    """Report what a turn has brought to each row, and draft the ids after its last one.

    Arguments and meaning are those of ``triton.propose``.
    """
    batch, rows = drafts.tokens.shape
    report = drafts.reports[int(drafts.turn) % len(drafts.reports)]
    for row in range(batch):
        length, seen = min(int(state.ids_length[row]), state.ids.shape[1]), int(drafts.seen[row])
        ids, done = state.ids[row, :length].numpy(), bool(state.finished[row])
        fresh = ids[seen : seen + rows]
        _judge(drafts, row, fresh, spent)
        found = -1 if done else find_match(ids[int(drafts.first[row]) :])
        drafts.tokens[row] = state.tokens[row]
        if found >= 0:
            # What follows a match near the end is shorter than the draft: then it repeats, as the ids do.
            following = ids[int(drafts.first[row]) + found + 1 :]
            drafts.tokens[row, 1:] = torch.from_numpy(np.resize(following, rows - 1))
        drafts.count[row] = rows - 1 if found >= 0 else 0
        wants = found >= 0 and int(drafts.streak[row]) >= int(drafts.need[row])
        report[row] = -1
        report[row, 0], report[row, 1] = length - seen, WANTS * wants + FINISHED * done
        report[row, REPORT_HEAD : REPORT_HEAD + len(fresh)] = torch.from_numpy(fresh)
        drafts.seen[row] = length
        drafts.steps.view(-1, rows)[row] = state.step[row] + torch.arange(rows, dtype=torch.int32, device="cpu")
    drafts.turn += 1


def _judge(drafts: DraftState, row: int, fresh: np.ndarray, spent: bool) -> None:
    """Settle a row's account by the ids that came after its draft was made."""
    streak, count = int(drafts.streak[row]), int(drafts.count[row])
    if not count:
        drafts.streak[row] = max(streak - 1, 0)
        return
    drafted = drafts.tokens[row, 1 : 1 + min(count, len(fresh))].numpy()
    right = drafted == fresh[: len(drafted)]
    matched = len(right) if right.all() else int(right.argmin())
    streak = min(streak + matched, LONGEST_STREAK) if matched else streak // 2
    if spent:
        balance = min(int(drafts.balance[row]) + 8 * matched - int(drafts.price[row]), BEST_BALANCE)
        need = FIRST_NEED if balance == BEST_BALANCE else int(drafts.need[row])
        if balance < 0:
            streak, need, balance = 0, min(2 * need, LAST_NEED), 0
        drafts.balance[row], drafts.need[row] = balance, need
    drafts.streak[row] = streak


def find_match(ids: np.ndarray) -> int:
    """Return where the last ids of [N] stood before, as the place of the last of them, or -1.

    Of several places it is one with the most equal ids up to ``LONGEST_MATCH``, and of those the latest.
    """
    last = len(ids) - 1
    places, best = np.flatnonzero(ids[:-1] == ids[-1]), -1
    for back in range(1, LONGEST_MATCH):
        places = places[places >= back]
        places = places[ids[places - back] == ids[last - back]]
        if not len(places):
            break
        if back + 1 >= SHORTEST_MATCH:
            best = int(places[-1])
    return best
