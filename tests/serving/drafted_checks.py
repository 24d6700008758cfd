"""Checks of rows with drafts against rows without, in Triton's interpreter and on a GPU.

Each takes a model in float32 and the most tokens of an answer. On a CPU the drafts are told, but for some that are wrong;
on a GPU, where captured steps draft by themselves, they come from the rows' ids.
"""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any
from unittest import mock

import captured_checks as checks
from captured_checks import prompt, run, tokens

from faster_chatglm_6b.serving.rows import captured, drafting
from faster_chatglm_6b.serving.rows.interface import RowRequest

# A place in the answers where a draft is wrong.
WRONG = 4


def make(model: Any, speculate: int | str, count: int = 2) -> captured.CapturedRows:
    """Return rows with drafts, whose pages hold NaN."""
    with mock.patch.object(captured, "CapturedRows", lambda *given: CapturedRows(*given, speculate=speculate)):
        return checks.make(model, count)


CapturedRows = captured.CapturedRows


@contextlib.contextmanager
def told(requests: Sequence[RowRequest], answers: list[list[int]], device: str) -> Iterator[dict[str, int]]:
    """Count turns, and on a CPU draft each request's answer for the rows that hold its prompt, but for some tokens."""
    wholes = [[*request.ids, *answer] for request, answer in zip(requests, answers, strict=True)]
    normal, choose, counts = drafting.kernels.propose, captured.StepGraphs.run, {"one": 0, "several": 0, "plain": 0}

    def propose(state: Any, drafts: Any, **options: Any) -> None:
        normal(state, drafts, **options)
        rows, positions = drafts.tokens.shape
        for row in range(rows):
            length = int(state.ids_length[row])
            mine = state.ids[row, :length].tolist()
            for whole, request in zip(wholes, requests, strict=True):
                if whole[:length] == mine and len(mine) >= len(request.ids):
                    draft = [*whole[length:], *(positions * [7])][: positions - 1]
                    wrong = len(request.ids) + WRONG - length
                    if 0 <= wrong < len(draft):
                        draft[wrong] = 9
                    drafts.tokens[row, 1:] = drafts.tokens.new_tensor(draft)
                    drafts.count[row] = positions - 1

    def counted(self: Any, key: tuple, step: Any, counter: Any) -> None:
        if isinstance(key[0], int):
            counts[key[-1][1] if len(key) > 3 else "plain"] += 1
        choose(self, key, step, counter)

    with contextlib.ExitStack() as stack:
        if device == "cpu":
            stack.enter_context(mock.patch.object(drafting.kernels, "propose", propose))
        stack.enter_context(mock.patch.object(captured.StepGraphs, "run", counted))
        yield counts


def same(
    model: Any, requests: Sequence[RowRequest], speculate: int | str, order: Sequence[int] | None = None
) -> dict[str, int]:
    """Check that drafts change no token and no end, and return the turns that they took."""
    expected = run(checks.make(model), requests, order)
    with told(requests, tokens(expected), model.device.type) as counts:
        found = run(make(model, speculate), requests, order)
    assert tokens(found) == tokens(expected)
    assert [[one.end for one in answer] for answer in found] == [[one.end for one in answer] for answer in expected]
    return counts


def check_drafts(model: Any, most: int) -> None:
    """Rows that come and go get several tokens in a turn, and end at a stop id or their most tokens inside a draft."""
    base = RowRequest(prompt(model, 9, 1), most)
    requests = [base, replace(base, ids=prompt(model, 124, 2)), replace(base, ids=prompt(model, 20, 3), max_tokens=3)]
    counts = same(model, requests, 7, [1, 0, 2])
    print(counts)
