"""Checks of rows in the captured loop against rows on the plain path, in Triton's interpreter and on a GPU.

Each check takes a model in float32, whose plain path is the reference, and the most tokens of an answer.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from faster_chatglm_6b.serving.rows import captured
from faster_chatglm_6b.serving.rows.interface import NewRow, RowFailure, RowRequest, RowToken
from faster_chatglm_6b.serving.rows.plain import PlainRows

# The two best scores of a step may be closer than two ways of adding them up.
NEAR_TIE = 1e-3
LONGEST = 256


def pages(rows: int) -> int:
    """Return the pages of so many rows of the longest sequences."""
    return rows * LONGEST // captured.PAGE_TOKENS


def prompt(model: Any, length: int, seed: int) -> tuple[int, ...]:
    """Return a random prompt of ``length`` tokens with its two special ones."""
    config, generator = model.config, torch.Generator().manual_seed(seed)
    text = torch.randint(20, 300, (length - 2,), generator=generator).tolist()
    return (*text, config.gmask_token_id, config.bos_token_id)


def run(rows: Any, requests: Sequence[RowRequest], order: Sequence[int] | None = None) -> list[list[RowToken]]:
    """Run requests on two rows or more, one more at each step, in pages that are handed out in a scattered order."""
    answers: list[list[RowToken]] = [[] for _ in requests]
    owner: dict[int, int] = {}
    held: dict[int, tuple[int, ...]] = {}
    waiting, free = list(order or range(len(requests))), list(range(rows.pages))
    while waiting or owner:
        new = []
        if waiting and len(owner) < rows.rows:
            row = next(place for place in range(rows.rows) if place not in owner)
            owner[row] = waiting.pop(0)
            held[row] = tuple(free.pop(-1 - place % len(free)) for place in range(pages(1)))
            new = [NewRow(row, held[row], requests[owner[row]])]
        with rows.turn():
            results = [*rows.start(new), *rows.step()]
        for result in results:
            assert isinstance(result, RowToken), result
            answers[owner[result.row]].append(result)
            if result.end:
                rows.stop(result.row)
                free += held.pop(result.row)
                del owner[result.row]
    return answers


def make(model: Any, count: int = 2, speculate: int | str = 0) -> captured.CapturedRows:
    """Return rows whose pages hold NaN, so that reading a key that nobody wrote shows."""
    rows = captured.CapturedRows(model, count, pages(count), speculate)
    rows._full.cache.storage.fill_(float("nan"))
    if model.config.pre_seq_len:
        with torch.no_grad():
            rows._full.cache.place_prefix(model.transformer.prefix_encoder.packed(torch.float32))
    return rows


def tokens(answers: list[list[RowToken]]) -> list[list[int]]:
    return [[one.token for one in answer] for answer in answers]


def check_greedy(model: Any, most: int) -> None:
    """Rows that come and go get what they get alone on the plain path, with penalties, biases and minimum lengths."""
    base = RowRequest(prompt(model, 9, 1), most)
    requests = [
        base,
        replace(base, ids=prompt(model, 70, 2), max_tokens=most + 1),
        replace(base, ids=prompt(model, 2, 3), repetition_penalty=1.3, logit_bias=((40, 3.0), (41, -100.0))),
        replace(base, ids=prompt(model, 140, 4), presence_penalty=1.5, frequency_penalty=0.7),
    ]
    expected = tokens(run(PlainRows(model, 2, pages(2)), requests))
    assert tokens(run(make(model), requests, [1, 0, 3, 2])) == expected
    ends = tuple({expected[0][1], expected[1][0]})
    stopped = [replace(base, end_ids=ends), replace(requests[1], end_ids=ends, min_tokens=2)]
    expected = run(PlainRows(model, 2, pages(2)), stopped)
    found = run(make(model), stopped)
    assert tokens(found) == tokens(expected)
    assert [answer[-1].end for answer in found] == [answer[-1].end for answer in expected]


def check_seeds(model: Any, most: int) -> None:
    """A seeded answer does not depend on its neighbours, its place, or how others choose their tokens."""
    base = RowRequest(prompt(model, 9, 1), most, temperature=3.0, top_p=0.95, seed=5)
    others = [
        replace(base, temperature=0.0, ids=prompt(model, 20, 2)),
        replace(base, top_k=7, seed=2**63 + 1),
        replace(base, presence_penalty=0.5, temperature=1.0),
    ]
    alone = [tokens(run(make(model, 1), [request]))[0] for request in (base, others[1])]
    beside = tokens(run(make(model, 2), [others[0], base, others[1], others[2]]))
    assert beside[1:3] == alone
    assert tokens(run(make(model, 1), [replace(base, seed=6)]))[0] != alone[0]


def check_logprobs(model: Any, most: int) -> None:
    """Log-probabilities are those of the model itself, whatever changes the scores."""
    request = RowRequest(prompt(model, 9, 1), most, top_logprobs=3, repetition_penalty=1.2)
    (expected,) = run(PlainRows(model, 1, pages(1)), [request])
    (found,) = run(make(model, 1), [request])
    assert tokens([found]) == tokens([expected])
    for one, other in zip(found, expected, strict=True):
        assert abs(one.logprobs.chosen - other.logprobs.chosen) < NEAR_TIE
        assert [token for token, _ in one.logprobs.top] == [token for token, _ in other.logprobs.top]


def check_places(model: Any, most: int) -> None:
    """A row that is stopped half way leaves nothing to the next one in its place; a bad prompt fails alone."""
    request = RowRequest(prompt(model, 9, 1), most)
    other = replace(request, ids=prompt(model, 12, 2))
    expected = tokens(run(PlainRows(model, 1, pages(1)), [other]))[0]
    rows, mine = make(model), tuple(range(pages(1)))
    bad = [replace(request, ids=(5, 6, 7)), replace(request, logit_bias=((10**6, 1.0),))]
    with rows.turn():
        failed = rows.start([NewRow(0, mine, request)]) + rows.start([NewRow(1, (), bad[0])])
        rows.stop(1)
        failed += rows.start([NewRow(1, (), bad[1])])
        assert [(type(one), one.row, type(one.error)) for one in failed] == 2 * [(RowFailure, 1, ValueError)]
        # A step that is queued is read after the next one; a CPU computes and reads it at once.
        assert len(rows.step()) == (rows._lookahead == 0)
        rows.stop(0)
        assert rows.start([NewRow(0, mine, other)]) == []
        found = []
        while len(found) < most:
            found += rows.step()
    assert [one.row for one in found] == most * [0]
    assert [one.token for one in found] == expected


def check_broken_scores(model: Any, most: int) -> None:
    """A row whose scores are not finite fails, and the others go on."""
    good = RowRequest(prompt(model, 9, 1), most)
    marked = 299
    (expected,) = tokens(run(PlainRows(model, 1, pages(1)), [good]))
    assert marked not in (*good.ids, *expected)
    # The head would spread the broken row of the embedding to all rows.
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone(), requires_grad=False)
    rows = make(model)
    weight = model.transformer.word_embeddings.weight
    kept = weight[marked].clone()
    with torch.no_grad():
        weight[marked] = float("nan")
    try:
        bad = replace(good, ids=(20, marked, *good.ids[-2:]))
        with rows.turn():
            results = rows.start(
                [NewRow(0, tuple(range(pages(1))), good), NewRow(1, tuple(range(pages(1), pages(2))), bad)]
            )
            for _ in range(most + 1):
                results += rows.step()
    finally:
        with torch.no_grad():
            weight[marked] = kept
    failures = [one for one in results if isinstance(one, RowFailure)]
    assert [one.row for one in failures] == [1] and isinstance(failures[0].error, ArithmeticError)
    assert [one.token for one in results if one.row == 0] == expected


def check_prefix(model: Any, most: int) -> None:
    """Prompts see the keys of a P-Tuning prefix, whose pages all rows share."""
    requests = [RowRequest(prompt(model, length, length), most) for length in (9, 70)]
    expected = tokens(run(PlainRows(model, 2, pages(2)), requests))
    assert tokens(run(make(model), requests)) == expected
