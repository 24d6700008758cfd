"""THUDM's own format: what LangChain's ChatGLM client and scripts written for api.py send."""

import json
from datetime import datetime

import httpx
import pytest


@pytest.fixture(scope="module")
def http(plain_url):
    with httpx.Client(base_url=plain_url, timeout=60) as client:
        yield client


def test_a_turn_and_the_next(http, chat_model, chat_tokenizer):
    history = []
    for query in ("My name is Anna.", "What is my name?"):
        response, expected = chat_model.chat(chat_tokenizer, query, history=history, do_sample=False)
        # What langchain_community.llms.ChatGLM posts: max_length is far beyond the model's.
        body = {
            "prompt": query,
            "temperature": 0,
            "history": history,
            "max_length": 20000,
            "top_p": 0.7,
            "sample_model_args": {},
        }
        answer = http.post("/", json=body).json()
        assert set(answer) == {"response", "history", "status", "time"} and answer["status"] == 200
        assert answer["response"] == response and answer["history"] == [list(turn) for turn in expected]
        datetime.strptime(answer["time"], "%Y-%m-%d %H:%M:%S")
        history = answer["history"]


def test_defaults_and_nulls(http):
    for body in ({"prompt": "你好"}, {"prompt": "你好", "history": None, "max_length": None, "top_p": None}):
        answer = http.post("/", json=body)
        assert answer.status_code == 200 and answer.json()["response"]


def test_max_length_counts_the_prompt(http, chat_tokenizer):
    query = "hello " * 20
    length = len(chat_tokenizer.encode_text(query)) + 2
    answer = http.post("/", json={"prompt": query, "max_length": length + 2, "temperature": 0}).json()
    assert len(chat_tokenizer.encode_text(answer["response"])) <= 3
    refused = http.post("/", json={"prompt": query, "max_length": length})
    assert refused.status_code == 400 and str(length) in refused.json()["error"]["message"]


@pytest.mark.parametrize("history", [[["only one"]], [["a", "b"], ["c"]], ["text"], [[1, 2]]])
def test_an_odd_history_is_refused_and_never_dropped(http, history):
    refused = http.post("/", json={"prompt": "hi", "history": history})
    assert refused.status_code == 400 and "history" in refused.json()["error"]["message"]


def test_an_empty_prompt_is_refused(http):
    assert http.post("/", json={"prompt": " "}).status_code == 400
    assert http.post("/", json={}).json()["error"]["param"] == "prompt"


def test_a_stream_of_growing_responses(http):
    body = {"prompt": "你好", "temperature": 0}
    whole = http.post("/", json=body).json()
    with http.stream("POST", "/stream", json=body) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        events = [json.loads(line.removeprefix("data: ")) for line in response.iter_lines() if line]
    assert len(events) > 3 and events[-1]["response"] == whole["response"] and events[-1]["history"] == whole["history"]
    assert [event["finished"] for event in events] == [False] * (len(events) - 1) + [True]
    for before, after in zip(events, events[1:], strict=False):
        assert after["response"] == before["response"] + after["delta"]
