"""Rows on the plain path: each gets what it gets alone, whoever comes and goes beside it."""

import threading

import pytest
import torch

from faster_chatglm_6b.decoding.loop import engine_of
from faster_chatglm_6b.serving.rows import plain as plain_rows
from faster_chatglm_6b.serving.rows.interface import NewRow, RowFailure, RowRequest
from faster_chatglm_6b.serving.rows.plain import PlainRows, pages_for

QUERIES = ["你好", "What is int8?", "What is the capital of France?", "1+2", "Tell me a joke", "Who are you?"]


def prompt(tokenizer, query: str) -> tuple[int, ...]:
    return (*tokenizer.encode_text(query), tokenizer.gmask_token_id, tokenizer.bos_token_id)


def finished(rows, requests, order=None) -> list[list[int]]:
    """Run requests, one more at each step; return their tokens."""
    answers, row_of = [[] for _ in requests], {}
    waiting = list(order or range(len(requests)))
    while waiting or row_of:
        new = []
        if waiting and len(row_of) < rows.rows:
            number = waiting.pop(0)
            row = next(place for place in range(rows.rows) if place not in row_of)
            row_of[row] = number
            new = [NewRow(row, (), requests[number])]
        for result in [*rows.start(new), *rows.step()]:
            assert not isinstance(result, RowFailure), result
            answers[row_of[result.row]].append(result.token)
            if result.end:
                rows.stop(result.row)
                del row_of[result.row]
    return answers


def test_greedy_rows_are_chat_alone(chat_model, chat_tokenizer):
    alone = [chat_model.chat(chat_tokenizer, query, do_sample=False)[0] for query in QUERIES]
    end = chat_tokenizer.eos_token_id
    requests = [RowRequest(prompt(chat_tokenizer, query), 200, (end,)) for query in QUERIES]
    answers = finished(PlainRows(chat_model, 3, 1), requests, order=[3, 0, 5, 1, 4, 2])
    texts = [chat_model.process_response(chat_tokenizer.decode(answer)) for answer in answers]
    assert texts == alone and all(answer[-1] == end for answer in answers)


def test_a_seeded_answer_does_not_depend_on_its_neighbours(chat_model, chat_tokenizer):
    requests = [
        RowRequest(prompt(chat_tokenizer, query), 8, temperature=6.0, seed=seed, top_p=0.99)
        for seed, query in enumerate(QUERIES)
    ]
    alone = [finished(PlainRows(chat_model, 1, 1), [request])[0] for request in requests]
    assert finished(PlainRows(chat_model, 4, 1), requests) == alone
    assert finished(PlainRows(chat_model, 3, 1), requests[::-1]) == alone[::-1]
    other = RowRequest(**{**vars(requests[0]), "seed": 99})
    assert finished(PlainRows(chat_model, 1, 1), [other])[0] != alone[0]


def test_rows_of_a_model_with_a_prefix(load_tuned, tiny_tokenizer):
    model = load_tuned(1)
    ids = prompt(tiny_tokenizer, "hello there")
    expected = model.generate(torch.tensor([ids]), max_new_tokens=6, do_sample=False)[0, len(ids) :].tolist()
    answer = finished(PlainRows(model, 2, 1), [RowRequest(ids, 6)])[0]
    assert answer[: len(expected)] == expected


def test_a_row_that_fails_leaves_the_others(chat_model, chat_tokenizer):
    good = RowRequest(prompt(chat_tokenizer, "1+2"), 4)
    no_prompt = RowRequest((5, 6, 7), 4)
    bad_bias = RowRequest(prompt(chat_tokenizer, "1+2"), 4, logit_bias=((10**6, 1.0),))
    rows = PlainRows(chat_model, 3, 1)
    results = rows.start([NewRow(0, (), good), NewRow(1, (), no_prompt), NewRow(2, (), bad_bias)])
    assert [type(result) for result in results[1:]] == [RowFailure, RowFailure]
    assert "<sop>" in str(results[1].error) or "[gMASK]" in str(results[1].error)
    for row in (1, 2):
        rows.stop(row)
    answer = [results[0].token] + [rows.step()[0].token for _ in range(3)]
    rows.stop(0)
    assert answer == finished(PlainRows(chat_model, 1, 1), [good])[0]
    assert rows.step() == []


def test_a_turn_waits_for_a_thread_that_has_the_model(chat_model):
    lock, rows, taken = engine_of(chat_model).lock, PlainRows(chat_model, 1, 1), threading.Event()

    def take():
        with rows.turn():
            taken.set()

    with lock:
        thread = threading.Thread(target=take)
        thread.start()
        assert not taken.wait(0.2)
    thread.join(10)
    assert taken.is_set() and not lock.locked()


def test_pages_of_the_memory(chat_model, monkeypatch):
    assert pages_for(chat_model, 2, 0.9) == 2 * 2048 // 64
    page = chat_model.config.hidden_size * 2 * 64 * 4 * (chat_model.config.num_layers + 1)
    fixed = plain_rows.workspace_bytes(chat_model, 1, 2048)
    monkeypatch.setattr(plain_rows, "free_bytes", lambda device: 2 * (fixed + 40 * page))
    assert pages_for(chat_model, 64, 0.5) == 40
    monkeypatch.setattr(plain_rows, "free_bytes", lambda device: fixed)
    with pytest.raises(ValueError, match="a prompt of 2048 tokens needs"):
        pages_for(chat_model, 64, 0.9)
    monkeypatch.setattr(plain_rows, "free_bytes", lambda device: None)
    assert pages_for(chat_model, 3, 0.9) == 3 * 32
