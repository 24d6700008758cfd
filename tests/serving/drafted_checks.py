"""Checks of rows with drafts against rows without, in Triton's interpreter and on a GPU.

Most run a ``Babbler`` in place of the network, which repeats itself before long. Each check takes a model in float32
and the most tokens of an answer.
"""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any
from unittest import mock

import captured_checks as checks
import torch
from captured_checks import prompt, run, tokens
from draft_checks import FIRST_ID, Babbler, quick_greedy

from faster_chatglm_6b.decoding.steps.decode import DecodeStep
from faster_chatglm_6b.ops.steps import step_kernels
from faster_chatglm_6b.serving.rows import captured
from faster_chatglm_6b.serving.rows.interface import NewRow, RowRequest
from faster_chatglm_6b.serving.rows.plain import PlainRows

# A place in the answers where a draft is wrong.
WRONG = 4


class RowBabbler(Babbler):
    """A babbler for rows. It knows few ids, so that it repeats itself soon; its samplers are quick on a CPU."""

    def __init__(self, model: Any, seed: int = 0, ids: int = 3):
        super().__init__(model, seed)
        self.table[:, FIRST_ID + ids :] = -30.0

    @contextlib.contextmanager
    def in_place(self, model: Any) -> Iterator[None]:
        def read(rows: captured.CapturedRows, part: Sequence[tuple[int, tuple[int, ...]]]) -> None:
            for row, ids in part:
                self.held(rows._full)[row, : len(ids)] = torch.tensor(ids, device=rows.device)

        with contextlib.ExitStack() as stack:
            stack.enter_context(mock.patch.object(captured.CapturedRows, "_run_prompts", read))
            stack.enter_context(mock.patch.object(DecodeStep, "run", lambda *arguments: self.run(*arguments)))
            if model.device.type != "cuda":
                stack.enter_context(mock.patch.object(step_kernels(model.device), "greedy_sample", quick_greedy))
            yield


def babbled(length: int, seed: int) -> tuple[int, ...]:
    """Return a prompt of ids that a babbler knows, but for the last two."""
    ids = torch.randint(FIRST_ID, FIRST_ID + 3, (length - 2,), generator=torch.Generator().manual_seed(seed))
    return (*ids.tolist(), 321, 324)


@contextlib.contextmanager
def turns() -> Iterator[dict[str, int]]:
    """Count the turns that are queued inside: of one token, of one token and new drafts, and of several."""
    counts, normal = {"plain": 0, "one": 0, "several": 0}, captured.StepGraphs.run

    def counted(self: Any, key: tuple, step: Any, counter: Any) -> None:
        if isinstance(key[0], int):
            counts[key[-1][1] if len(key) > 3 else "plain"] += 1
        normal(self, key, step, counter)

    with mock.patch.object(captured.StepGraphs, "run", counted):
        yield counts


@contextlib.contextmanager
def told(model: Any, requests: Sequence[RowRequest], answers: Sequence[Sequence[int]]) -> Iterator[None]:
    """Draft each request's answer, but for one token, for the rows that hold its prompt; steps must not be captured."""
    steps = step_kernels(model.device)
    normal = steps.propose

    def propose(state: Any, drafts: Any, **options: Any) -> None:
        normal(state, drafts, **options)
        rows, positions = drafts.tokens.shape
        for row in range(rows):
            length = int(state.ids_length[row])
            for request, answer in zip(requests, answers, strict=True):
                whole, start = [*request.ids, *answer], len(request.ids)
                if start <= length and whole[:length] == state.ids[row, :length].tolist():
                    whole[start + WRONG :][:1] = [9]
                    draft = [*whole[length:], *(positions * [7])][: positions - 1]
                    drafts.tokens[row, 1:] = drafts.tokens.new_tensor(draft)
                    drafts.count[row] = positions - 1

    with mock.patch.object(steps, "propose", propose):
        yield


def same(
    model: Any,
    requests: Sequence[RowRequest],
    kinds: Sequence[int | str],
    order: Sequence[int] | None = None,
    rows: int = 2,
    tells: bool = False,
) -> list[dict[str, int]]:
    """Check that drafts change no token and no end, and return the turns that each kind took, first those without."""
    with turns() as counts:
        expected, taken = run(checks.make(model, rows), requests, order), [counts]
    for kind in kinds:
        with told(model, requests, tokens(expected)) if tells else contextlib.nullcontext(), turns() as counts:
            found = run(checks.make(model, rows, kind), requests, order)
        assert tokens(found) == tokens(expected)
        assert [[one.end for one in answer] for answer in found] == [[one.end for one in answer] for answer in expected]
        taken.append(counts)
    return taken


def check_drafts(model: Any, most: int) -> None:
    """Rows that come and go get the same tokens in fewer turns, with drafts in every turn or where they pay."""
    requests = [RowRequest(babbled(length, length), 24 - length) for length in (5, 13, 7)]
    with RowBabbler(model, 45).in_place(model):
        none, always, auto = same(model, requests, (3, "auto"), [1, 0, 2])
    assert not none["one"] + none["several"] + always["plain"] + always["one"] + auto["plain"]
    assert always["several"] < sum(auto.values()) < none["plain"], (none, always, auto)


def check_ends_inside_drafts(model: Any, most: int) -> None:
    """A row ends at its most tokens or at an end token where it ends without drafts, and its neighbours go on."""
    tells = model.device.type == "cpu"
    with RowBabbler(model, 45, ids=12).in_place(model):
        whole = RowRequest(babbled(5, 5), 16)
        (answer,) = tokens(run(checks.make(model, 1), [whole]))
        requests = [replace(whole, max_tokens=most) for most in (1, 8, 9, 10)]
        first = {token: answer.index(token) for token in answer}
        ends = sorted(first, key=first.get)[2:5]
        assert first[ends[-1]] > 3, answer
        requests += [replace(whole, end_ids=(end, 7)) for end in ends]
        _, counts = same(model, requests, (7,), rows=3, tells=tells)
    assert not tells or counts["several"] < 16, counts


def check_without_drafts(model: Any, most: int) -> None:
    """A row whose tokens ask for more than a draft knows lets its neighbours wait with their drafts."""
    base = RowRequest(babbled(5, 5), 18)
    with RowBabbler(model, 45).in_place(model):
        for kind, other in (
            (7, {"top_logprobs": 2}),
            ("auto", {"repetition_penalty": 1.3, "logit_bias": ((11, 4.0),)}),
        ):
            requests = [base, replace(base, ids=babbled(9, 4), max_tokens=3, **other)]
            _, counts = same(model, requests, (kind,))
            assert counts["plain"] >= 3 and counts["several"], (other, counts)
        many = [replace(base, ids=babbled(4, seed), max_tokens=5) for seed in range(17)]
        rows, news = checks.make(model, 17, 7), [NewRow(row, (row,), one) for row, one in enumerate(many)]
        with rows.turn(), turns() as counts:
            found = rows.start(news[:4]) + rows.step() + rows.start(news[4:]) + rows.step() + rows.step()
            for row in range(3, 17):
                rows.stop(row)
            for _ in range(5):
                found += rows.step()
        assert counts["plain"] == 2 and counts["several"] >= 2, counts
        expected = tokens(run(checks.make(model, 3), many[:3]))
    assert [[one.token for one in found if one.row == row] for row in range(3)] == expected


def check_seeds_with_drafts(model: Any, most: int) -> None:
    """A seeded row draws the same tokens, whether they come by drafts or one after the other."""
    base = RowRequest(prompt(model, 5, 1), most + 2, temperature=0.7, top_k=5, top_p=0.9, seed=2**63 + 5)
    requests = [base, replace(base, ids=prompt(model, 4, 2), temperature=0.0)]
    with RowBabbler(model, 2).in_place(model):
        _, counts = same(model, requests, (3,), tells=model.device.type == "cpu")
    assert model.device.type == "cuda" or counts["several"] < most + 3, counts


def check_pages_with_drafts(model: Any, most: int) -> None:
    """Drafts cross the end of a page, and those beyond a row's most tokens touch no page of another row."""
    with mock.patch.object(captured, "PAGE_TOKENS", 16):
        requests = [RowRequest(prompt(model, length, length), 6) for length in (14, 10)]
        expected = tokens(run(PlainRows(model, 1, checks.pages(1)), requests))
        rows, found = checks.make(model, 1, 3), []
        storage = rows._full.cache.storage
        with (
            told(model, requests, expected) if model.device.type == "cpu" else contextlib.nullcontext(),
            turns() as counts,
        ):
            for request, pages in zip(requests, ((4, 7), (2,)), strict=True):
                before = storage.nan_to_num(nan=1e4)
                with rows.turn():
                    found.append(rows.start([NewRow(0, pages, request)]))
                    while not (found[-1] and found[-1][-1].end):
                        found[-1] += rows.step()
                    rows.stop(0)
    assert tokens(found) == expected
    assert model.device.type == "cuda" or counts["several"] < 11, counts
    # The row before held page 7 in the place where this one has none.
    changed = (storage.nan_to_num(nan=1e4) != before).any(5).any(4).any(3).any(1).any(0)
    assert changed.nonzero().flatten().tolist() == [2]
