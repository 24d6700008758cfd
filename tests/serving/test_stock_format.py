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
    refused = http.post("/", json={"prompt": query, "max_length": 17}).json()["error"]
    assert f"{length} tokens" in refused["message"] and "at most 17 of" in refused["message"]
    assert refused["param"] == "max_length" and "2048" not in refused["message"]


JSON_TYPE = {"content-type": "application/json"}
ODD_MESSAGES = [
    {"role": "system", "content": "Be kind.", "score": float("nan")},
    {
        "role": "user",
        "content": [{"type": "text", "text": "My name ", "\ud800": 1}, {"type": "text", "text": "is Anna."}],
    },
    {"role": "assistant", "content": "Hello, Anna!", "name": "\udfff", "parts": [float("inf")]},
]
PLAIN_MESSAGES = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "My name is Anna."},
    {"role": "assistant", "content": "Hello, Anna!"},
]


@pytest.mark.parametrize(
    ("history", "plain"),
    [(ODD_MESSAGES, PLAIN_MESSAGES), ([[], ["My name is Anna.", "Hello"]], [["My name is Anna.", "Hello"]])],
)
def test_a_history_comes_back_in_its_form_and_can_be_sent_again(http, history, plain):
    query = "What is my name?"
    body = {"prompt": query, "history": history, "temperature": 0}
    answer = http.post("/", content=json.dumps(body), headers=JSON_TYPE).json()
    said = answer["response"]
    is_messages = isinstance(plain[0], dict)
    last = (
        [{"role": "user", "content": query}, {"role": "assistant", "content": said}] if is_messages else [[query, said]]
    )
    assert said and answer["history"] == [*plain, *last]
    streamed = http.post("/stream", content=json.dumps(body), headers=JSON_TYPE).text.strip().split("\n\n")
    event = json.loads(streamed[-1].removeprefix("data: "))
    assert event["finished"] and event["history"] == answer["history"]
    again = http.post("/", json={"prompt": "你好", "history": answer["history"], "temperature": 0})
    assert again.status_code == 200 and len(again.json()["history"]) == len(answer["history"]) + len(last)


@pytest.mark.parametrize("path", ["/", "/stream"])
@pytest.mark.parametrize(
    "fields",
    [
        {"prompt": "\ud800"},
        {"prompt": "hi", "history": [["\udc00", "a"]]},
        {"prompt": "hi", "history": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "\udc00"}]},
    ],
)
def test_half_a_character_is_refused_in_one_sentence(http, path, fields):
    refused = http.post(path, content=json.dumps(fields), headers=JSON_TYPE)
    assert refused.status_code == 400 and "surrogate" in refused.json()["error"]["message"]


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
