"""Many prompts without a server."""

import itertools
import threading

import pytest
from scripted_rows import ScriptedRows, scripted_answer

from faster_chatglm_6b.serving.engine import EngineFailed
from faster_chatglm_6b.serving.offline import _Run, answer_many

QUERIES = ["你好", "What is int8?", "1+2"]


def test_each_answer_is_chats(chat_model, chat_tokenizer):
    history = [{"role": "user", "content": "My name is Anna."}, {"role": "assistant", "content": "Hello, Anna!"}]
    conversation = [*history, {"role": "user", "content": "What is my name?"}]
    expected = [chat_model.chat(chat_tokenizer, query, do_sample=False)[0] for query in QUERIES]
    expected.append(chat_model.chat(chat_tokenizer, "What is my name?", history=history, do_sample=False)[0])
    found = list(answer_many(chat_model, chat_tokenizer, [*QUERIES, conversation], temperature=0, max_rows=2))
    assert [one.text for one in sorted(found, key=lambda one: one.index)] == expected
    assert {one.end for one in found} == {"stop"} and all(one.tokens > 2 for one in found)


def run(model, tokenizer, prompts, rows=None, **settings):
    rows = rows or ScriptedRows(4, 1024)
    found = list(answer_many(model, tokenizer, prompts, rows=rows, **{"max_tokens": 12} | settings))
    assert rows.faults == [] and rows.occupied == 0
    return {one.index: one for one in found}, rows


def test_answers_depend_on_prompt_place_and_seed_alone(chat_model, chat_tokenizer):
    prompts = [f"prompt {number}" for number in range(300)]
    one, rows = run(chat_model, chat_tokenizer, prompts)
    assert sorted(one) == list(range(300)) and len(rows.started) == 300
    other, _ = run(chat_model, chat_tokenizer, prompts, ScriptedRows(64, 4096, lag=True))
    assert all(other[index].text == answer.text for index, answer in one.items())
    seeded, rows = run(chat_model, chat_tokenizer, prompts[:5], seed=1)
    assert all(seeded[index].text != one[index].text for index in range(5))
    assert seeded[0].tokens == len(scripted_answer(rows.started[0]))


def test_prompts_are_taken_as_they_are_needed(chat_model, chat_tokenizer):
    taken = []
    endless = (taken.append(number) or f"prompt {number}" for number in itertools.count())
    rows = ScriptedRows(2, 1024)
    answers = answer_many(chat_model, chat_tokenizer, endless, rows=rows, max_tokens=3)
    assert [next(answers).end for _ in range(10)] == ["length"] * 10
    assert len(taken) < 100
    answers.close()
    assert rows.faults == []


def test_endless_prompts_of_which_none_can_be_answered(chat_model, chat_tokenizer):
    answers = answer_many(chat_model, chat_tokenizer, itertools.repeat(5), rows=ScriptedRows(2, 1024))
    assert [next(answers).end for _ in range(200)] == ["error"] * 200
    answers.close()


def test_answers_come_while_prompts_are_read(chat_model, chat_tokenizer, monkeypatch):
    is_ready = threading.Event()
    call = _Run.call_soon_threadsafe
    monkeypatch.setattr(_Run, "call_soon_threadsafe", lambda *arguments: call(*arguments) or is_ready.set())

    def prompts():
        yield "one"
        assert is_ready.wait(20)
        yield "two"
        pytest.fail("a third prompt was asked for before the first answer was yielded")

    answers = answer_many(chat_model, chat_tokenizer, prompts(), rows=ScriptedRows(2, 1024), max_tokens=1)
    assert next(answers).index == 0
    answers.close()


def test_an_engine_that_fails_is_no_answer(chat_model, chat_tokenizer):
    rows = ScriptedRows(4, 1024)
    rows.raise_on_exit = lambda: OSError("the lock is gone") if rows.steps == 20 else None
    finished = []
    with pytest.raises(EngineFailed, match="the lock is gone"):
        for one in answer_many(chat_model, chat_tokenizer, itertools.repeat("hi"), rows=rows, max_tokens=4):
            finished.append(one)
    assert {one.end for one in finished} == {"length"} and rows.occupied == 0


def test_a_prompt_that_cannot_be_answered_is_an_answer_with_its_error(chat_model, chat_tokenizer):
    def fails(request, index):
        return RuntimeError("a fault") if len(request.ids) == failing and index == 2 else None

    failing = len(chat_tokenizer.encode_text("fail here, please")) + 2
    prompts = ["one", "hello " * 3000, "fail here, please", 5, [{"role": "boss", "content": "x"}], "two"]
    found, _ = run(chat_model, chat_tokenizer, prompts, ScriptedRows(4, 1024, fails=fails))
    assert [found[index].end for index in range(6)] == ["length", "error", "error", "error", "error", "length"]
    assert "2048" in str(found[1].error) and "a fault" in str(found[2].error) and "boss" in str(found[4].error)


def test_stop_strings_end_an_answer(chat_model, chat_tokenizer):
    whole, _ = run(chat_model, chat_tokenizer, ["one"])
    stop = whole[0].text[3:6]
    found, _ = run(chat_model, chat_tokenizer, ["one"], stop=[stop], max_tokens=1000)
    assert found[0].end == "stop" and stop not in found[0].text and found[0].tokens <= 12


def test_arguments_that_cannot_work_are_refused_at_once(chat_model, chat_tokenizer):
    with pytest.raises(ValueError, match="one text"):
        answer_many(chat_model, chat_tokenizer, "hello")
    with pytest.raises(TypeError, match="warmth"):
        answer_many(chat_model, chat_tokenizer, ["hello"], warmth=1)
    assert list(answer_many(chat_model, chat_tokenizer, [], rows=ScriptedRows())) == []
