"""Checks of speculation's kernels against float64 and plain Python, shared by the interpreter's and the GPU's tests.

Each takes a device, draws random inputs, fills what the kernel must write with NaN or a wrong number, and asserts.
"""

import torch
from operator_checks import assert_close, attention64, poison, random, rotate64, tables
from page_checks import contiguous, paged
from sampling_checks import EOS, make_state

from faster_chatglm_6b.ops import triton as kernels
from faster_chatglm_6b.ops.states import (
    BEST_BALANCE,
    FINISHED,
    FIRST_BALANCE,
    FIRST_NEED,
    LAST_NEED,
    LONGEST_STREAK,
    WANTS,
)

PRICE = 3


def make_drafts(device: str, batch: int, rows: int, seen: int = 0, first: int = 0) -> kernels.DraftState:
    def number(value: int) -> torch.Tensor:
        return torch.full((batch,), value, dtype=torch.int32, device=device)

    return kernels.DraftState(
        tokens=torch.full((batch, rows), -9, device=device),
        count=number(0),
        seen=number(seen),
        first=number(first),
        streak=number(0),
        need=number(FIRST_NEED),
        balance=number(FIRST_BALANCE),
        price=number(PRICE),
        steps=torch.full((batch * rows,), -9, dtype=torch.int32, device=device),
        reports=torch.full((3, batch, 2 + rows), -9, device=device),
        turn=number(0)[:1].clone(),
    )


def check_draft_attention(
    device: str,
    dtype: torch.dtype,
    batch: int,
    rows: int,
    heads: int,
    size: int,
    length: int,
    splits: int | None,
    two: bool = True,
    room: int = 9,
    page: int = 0,
    padded: bool = False,
) -> None:
    """Check rows that stand at different places, the first at ``length``; every third is done.

    Of the first row's new keys, ``room`` find a slot. With ``page`` the caches lie in pages of so many slots.
    """
    capacity = length + room
    qkv = random(device, dtype, batch, rows, 3 * heads * size)
    slot = torch.randint(0, length + 1, (batch,), dtype=torch.int32, device=device)
    slot[0] = length
    finished = (torch.arange(batch, device=device) % 3 == 1).int()
    most = -(-(capacity + 3) // page) * page if page else capacity + 3
    longer = [poison(device, dtype, batch, heads, most, size) for _ in range(2)]
    caches = [cache[:, :, :capacity] for cache in longer]
    first_key = (torch.rand(batch, device=device) * (slot + 1)).int()
    first_key[0] = 0
    if page and not padded:
        first_key = first_key // page * page
    for row in range(batch):
        for cache in caches:
            # The keys of a row that is done stay poisoned, as do those of drafts that were not kept.
            visible = cache[row, :, first_key[row] : 0 if finished[row] else slot[row]]
            visible.copy_(random(device, dtype, *visible.shape))
    before = [cache.clone() for cache in longer]
    position = torch.randint(0, 40, (batch,), dtype=torch.int32, device=device)
    sop_index = (torch.rand(batch, device=device) * (slot + 1)).int()
    cos, sin = tables(device, dtype, length + 70, size // 4 if two else size // 2)
    workspace = kernels.Workspace(device, batch * rows, heads, size, 1024)
    workspace.partial.fill_(float("nan"))
    out = poison(device, dtype, batch, rows, heads * size)
    arguments = slot, finished, first_key, position, sop_index, cos, sin
    options = {"splits": splits, "workspace": workspace, "out": out}
    limit = torch.full_like(slot, capacity)
    if page:
        # Some rows have room for one of their new keys only.
        limit[1:] = torch.minimum(slot + 1 + 20 * (slot % 2), limit)[1:]
        pools, table = paged(longer, page)
        given = table.clone()
        for row in range(batch):
            # Pages beyond a row's own are another's.
            given[row, -(-int(limit[row]) // page) :] = table[row - 1, int(slot[row - 1]) // page]
        kernels.draft_attention(qkv, *pools, *arguments, block_table=given, limit=limit, padded=padded, **options)
        longer = [contiguous(pool, table) for pool in pools]
    else:
        kernels.draft_attention(qkv, *caches, *arguments, **options)
    query, key, value = qkv.view(batch, rows, heads, 3, size).permute(3, 0, 2, 1, 4)
    step = torch.arange(rows, device=device)
    places = [position.long()[:, None, None], (slot[:, None] + step - sop_index[:, None] + 1).long()[:, None]]
    places = places[: 2 if two else 1]
    places = [place.expand(batch, heads, rows) for place in places]
    query, key = rotate64(query, places, cos, sin).to(dtype), rotate64(key, places, cos, sin)
    for row in range(batch):
        start, stop = int(slot[row]), min(int(slot[row]) + rows, int(limit[row]))
        for cache, old, new in zip(longer, before, (key, value.double()), strict=True):
            if finished[row]:
                assert cache[row].isnan().all()
                continue
            assert_close(cache[row, :, start:stop], new[row, :, : stop - start])
            rest, old_rest = cache[row].clone(), old[row].clone()
            rest[:, start:stop] = old_rest[:, start:stop] = 0
            assert torch.equal(rest.isnan(), old_rest.isnan())
            assert torch.equal(rest.nan_to_num(), old_rest.nan_to_num())
        one = slice(row, row + 1)
        first = torch.zeros_like(first_key[one]) if finished[row] else first_key[one]
        held = [
            torch.cat((cache[one, :, : 0 if finished[row] else start], new[one].to(dtype)), 2).nan_to_num()
            for cache, new in zip(longer, (key, value), strict=True)
        ]
        earlier = held[0].shape[2] - rows
        for j in range(rows):
            expected = attention64(query[one, :, j], *held, first, earlier + j)
            assert_close(out.view(batch, rows, heads, size)[one, j], expected)
    assert not workspace.counters.any()


def expected_draft(ids: list[int], first: int, k: int) -> list[int]:
    """Return the k ids after the latest of the longest matches of the last ids, or none."""
    ids = ids[first:]
    for size in (4, 3, 2):
        if len(ids) <= size:
            continue
        for start in reversed(range(len(ids) - size)):
            if ids[start : start + size] == ids[-size:]:
                found = list(ids)
                for place in range(k):
                    found.append(found[start + size + place])
                return found[len(ids) :]
    return []


def check_propose(device: str, rows: int, length: int, tokens: int, spent: bool) -> None:
    """Check drafts, reports and the account of each row over turns that bring 1 to ``rows`` ids."""
    draw = torch.Generator().manual_seed(length)
    batch, k = 4, rows - 1
    capacity = length + 6 * rows
    text = torch.randint(0, tokens, (batch, capacity), generator=draw)
    state = make_state(device, batch, capacity=capacity, length=length)
    workspace = kernels.Workspace(device, batch, 2, 32, 1024)
    drafts = make_drafts(device, batch, rows, seen=length - 1)
    drafts.first.copy_(torch.tensor([0, 3, length - 3, length - 1]))
    state.ids.copy_(text)
    # What lies behind the ids may be anything, even a match.
    lengths, finished = [length] * batch, [False] * batch
    account = [[0, FIRST_NEED, FIRST_BALANCE] for _ in range(batch)]
    seen, drafted = [length - 1] * batch, [[] for _ in range(batch)]
    for turn in range(5):
        if turn == 3:
            finished[3] = True
        state.finished.copy_(torch.tensor(finished))
        state.step.copy_(torch.tensor([turn, 5, 7, 9]))
        for row in range(batch):
            state.ids_length[row] = lengths[row]
            state.tokens[row] = text[row, lengths[row] - 1]
        kernels.propose(state, drafts, spent=spent, workspace=workspace)
        assert int(drafts.turn) == turn + 1
        for row in range(batch):
            fresh = text[row, seen[row] : lengths[row]].tolist()
            pairs = list(zip(fresh, drafted[row], strict=False))
            matched = next((i for i, (a, b) in enumerate(pairs) if a != b), len(pairs))
            account[row] = expected_account(account[row], matched, bool(drafted[row]), spent)
            streak, need, balance = account[row]
            assert [int(one[row]) for one in (drafts.streak, drafts.need, drafts.balance)] == account[row]
            drafted[row] = (
                [] if finished[row] else expected_draft(text[row, : lengths[row]].tolist(), int(drafts.first[row]), k)
            )
            assert int(drafts.count[row]) == len(drafted[row])
            current = int(text[row, lengths[row] - 1])
            assert drafts.tokens[row].tolist() == [current, *(drafted[row] or [current] * k)]
            report = drafts.reports[turn % 3, row].tolist()
            flags = WANTS * (bool(drafted[row]) and streak >= need) + FINISHED * finished[row]
            assert report[:2] == [len(fresh), flags] and report[2 : 2 + len(fresh)] == fresh
            start = int(state.step[row])
            assert drafts.steps.view(batch, rows)[row].tolist() == list(range(start, start + rows))
            seen[row] = lengths[row]
            # Let some drafts come true.
            new = 1 + (turn + row) % rows
            copied = drafted[row][:new] if (turn + row) % 3 else []
            text[row, lengths[row] : lengths[row] + len(copied)] = torch.tensor(copied, dtype=torch.int64)
            lengths[row] += new
        state.ids.copy_(text)
    assert not workspace.counters.any()


def expected_account(account: list[int], matched: int, had_draft: bool, spent: bool) -> list[int]:
    streak, need, balance = account
    if not had_draft:
        return [max(streak - 1, 0), need, balance]
    streak = min(streak + matched, LONGEST_STREAK) if matched else streak // 2
    if spent:
        balance = min(balance + 8 * matched - PRICE, BEST_BALANCE)
        need = FIRST_NEED if balance == BEST_BALANCE else need
        if balance < 0:
            streak, need, balance = 0, min(2 * need, LAST_NEED), 0
    return [streak, need, balance]


def check_back_off(device: str) -> None:
    """Check that a row whose drafts always fail asks for fewer and fewer steps, and one whose drafts hold for all."""
    rows, capacity = 4, 400
    state, drafts = make_state(device, 2, length=8, capacity=capacity), make_drafts(device, 2, rows, seen=8)
    workspace = kernels.Workspace(device, 2, 2, 32, 1024)
    # The drafts of the first row always come true, and those of the second one never.
    state.ids.copy_(torch.arange(4, device=device).repeat(2, capacity // 4))
    asked = []
    for turn in range(24):
        state.ids_length.fill_(9 + turn)
        state.tokens.copy_(state.ids[:, 8 + turn])
        kernels.propose(state, drafts, spent=True, workspace=workspace)
        asked.append(drafts.reports[turn % 3, :, 1].tolist())
        drafts.count[1], drafts.tokens[1, 1:] = 3, -1
        # As if steps of one token had shown a few hits again.
        drafts.streak[1] = 10
    assert [one for one, _ in asked] == 3 * [0] + 21 * [WANTS], asked
    assert [other for _, other in asked] == [0, WANTS, WANTS] + 21 * [0], asked
    assert drafts.need.tolist() == [FIRST_NEED, LAST_NEED]


def check_accept(device: str, rows: int) -> None:
    """Check each row's number of kept ids, with ends and limits inside a draft, and rows that are done."""
    draw = torch.Generator().manual_seed(rows)
    batch, capacity, length = 72, 48, 12
    state, drafts = make_state(device, batch, length=length, capacity=capacity), make_drafts(device, batch, rows)
    state.ids_length.copy_(torch.randint(6, capacity - 2, (batch,), generator=draw))
    state.cache_length.copy_(state.ids_length + 3)
    state.step.copy_(torch.randint(0, 99, (batch,), generator=draw))
    state.limit.copy_(state.ids_length + torch.randint(1, rows + 3, (batch,), generator=draw).to(device))
    state.finished.copy_(torch.arange(batch) % 5 == 4)
    drafts.tokens.copy_(torch.randint(EOS, EOS + 30, (batch, rows), generator=draw))
    drafts.count.copy_(torch.where(torch.arange(batch) % 4 == 1, 0, rows - 1))
    sampled = torch.randint(EOS + 2, EOS + 6, (batch, rows), generator=draw).to(device)
    for row in range(batch):
        kept = row % (rows + 1)
        sampled[row, :kept] = torch.cat((drafts.tokens[row, 1:], drafts.tokens[row, :1]))[:kept]
    names = ("tokens", "finished", "ids", "ids_length", "cache_length", "step")
    before = {name: getattr(state, name).clone() for name in names}
    unchanged = {name: value.clone() for name, value in vars(drafts).items()}
    kernels.accept(sampled.view(-1), state, drafts)
    ends, counts = set(state.eos_ids[0].tolist()), set()
    for row in range(batch):
        expected = {name: value[row].clone() for name, value in before.items()}
        kept = 0
        while not expected["finished"] and kept < rows:
            token = int(sampled[row, kept])
            kept += 1
            if expected["ids_length"] < capacity:
                expected["ids"][expected["ids_length"]] = token
            for name in ("ids_length", "cache_length", "step"):
                expected[name] += 1
            expected["tokens"].fill_(token)
            is_end = token in ends or expected["ids_length"] >= state.limit[row]
            expected["finished"].fill_(int(is_end))
            if kept > int(drafts.count[row]) or token != int(drafts.tokens[row, kept]):
                break
        counts.add(kept)
        for name, value in expected.items():
            assert torch.equal(getattr(state, name)[row], value), (row, name)
    assert counts == set(range(rows + 1))
    assert all(torch.equal(getattr(drafts, name), value) for name, value in unchanged.items())
