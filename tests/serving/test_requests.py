"""What cannot be served is refused in one sentence, in OpenAI's form; what can be left out is left out."""

import json
import logging
import re

import httpx
import pytest

MESSAGES = [{"role": "user", "content": "hi"}]
IMAGE = [{"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}]


@pytest.fixture(scope="module")
def http(plain_url):
    with httpx.Client(base_url=plain_url, timeout=60) as client:
        yield client


def error_of(response, status=400) -> dict:
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["message"]
    assert response.headers["x-request-id"]
    return error


def chat(http, **fields):
    return http.post("/v1/chat/completions", json={"messages": MESSAGES, "max_tokens": 1, **fields})


@pytest.mark.parametrize(
    ("fields", "param", "said"),
    [
        ({"temperature": -1}, "temperature", "greater than or equal to 0"),
        ({"temperature": "warm"}, "temperature", "number"),
        ({"top_p": 0}, "top_p", "greater than 0"),
        ({"top_p": 1.5}, "top_p", "less than or equal to 1"),
        ({"top_k": -2}, "top_k", "-1"),
        ({"max_tokens": 0}, "max_tokens", "1"),
        ({"max_tokens": "many"}, "max_tokens", "integer"),
        ({"n": 0}, "n", "1"),
        ({"n": 1000}, "n", "128"),
        ({"stop": ""}, "stop", "empty"),
        ({"stop": ["a", ""]}, "stop", "empty"),
        ({"stop": "x" * 257}, "stop", "256 characters"),
        ({"stop": ["x"] * 17}, "stop", "at most 16"),
        ({"seed": 2**70}, "seed", ""),
        ({"logit_bias": {"hello": 1}}, "logit_bias", "ids of tokens"),
        ({"logit_bias": {"5": 101}}, "logit_bias", "100"),
        ({"logit_bias": {"99999": 1}}, "logit_bias", "2047"),
        ({"logit_bias": {"5": 1, "05": 1}}, "logit_bias", "leading zeros"),
        ({"logit_bias": {str(index): 1 for index in range(301)}}, "logit_bias", "at most 300"),
        ({"stop_token_ids": [5] * 65}, "stop_token_ids", "at most 64"),
        ({"stop_token_ids": [-1]}, "stop_token_ids", "2047"),
        ({"min_tokens": 5}, "min_tokens", "room for 1"),
        ({"top_logprobs": 2}, "top_logprobs", "logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "20"),
        ({"messages": []}, None, "no message"),
        ({"messages": "hi"}, "messages", "list"),
        ({"messages": [{"content": "hi"}]}, "messages.0.role", "required"),
        ({"messages": [{"role": "user", "content": ""}]}, "messages", "empty"),
        ({"messages": [{"role": "user", "content": None}]}, "messages", "must be a text"),
        ({"messages": [{"role": "user", "content": IMAGE}]}, "messages", "image_url"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages", "tools"),
        ({"messages": [{"role": "boss", "content": "x"}]}, "messages", "boss"),
        ({"messages": [*MESSAGES, *MESSAGES]}, "messages", "take turns"),
        ({"messages": [*MESSAGES, {"role": "assistant", "content": "a"}]}, "messages", "nothing to answer"),
        ({"messages": [{"role": "system", "content": "s"}]}, "messages", "no message of the user"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, None, ""),
        ({"tools": [{"type": "function"}]}, "tools", "not supported"),
        ({"functions": [{}]}, "functions", "not supported"),
        ({"response_format": {"type": "json_schema"}}, "response_format", "not supported"),
        ({"modalities": ["text", "audio"]}, "modalities", "not supported"),
        ({"guided_json": {}}, "guided_json", "not supported"),
        ({"use_beam_search": True}, "use_beam_search", "not supported"),
        ({"best_of": 3}, "best_of", "not supported"),
    ],
    ids=lambda value: ascii(value)[:50],
)
def test_a_field_that_cannot_be_honoured(http, fields, param, said):
    content = json.dumps({"messages": MESSAGES, "max_tokens": 1, **fields})
    error = error_of(http.post("/v1/chat/completions", content=content, headers={"content-type": "application/json"}))
    assert said in error["message"] and error["type"] == "invalid_request_error"
    assert param is None or error["param"] == param


def test_fields_that_ask_for_nothing_are_taken(http):
    nothing = {"tools": [], "tool_choice": "none", "response_format": {"type": "text"}, "n": 1, "user": "me"}
    nothing |= {"logprobs": False, "stop": None, "seed": None, "temperature": None, "stream": None, "best_of": 1}
    assert chat(http, **nothing).status_code == 200


def test_the_most_of_stops_and_biases_is_taken(http):
    most = {"stop": ["\uff5e" * 256] * 16, "stop_token_ids": [7] * 64}
    assert chat(http, **most, logit_bias={str(index): -1 for index in range(300)}).status_code == 200


def test_unknown_fields_are_one_line_in_the_log(http, caplog):
    with caplog.at_level(logging.WARNING, "faster_chatglm_6b.serving"):
        assert chat(
            http, store=True, metadata={"a": "b"}, **{"x\ny\ud800".encode("ascii", "ignore").decode(): 1}
        ).is_success
    lines = [record.getMessage() for record in caplog.records if "ignored" in record.getMessage()]
    assert len(lines) == 1 and "metadata" in lines[0] and "store" in lines[0] and "\n" not in lines[0]


@pytest.mark.parametrize(
    "body", [b"", b"{", b'{"messages": [', b"\xff\xfe", b"null", b"[]", b'"text"', b"1", b"[" * 100_000, b'{"a": NaN,}']
)
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/tokenize", "/"])
def test_a_body_that_is_no_request(http, body, path):
    error_of(http.post(path, content=body, headers={"content-type": "application/json"}))


def test_a_body_without_a_type_is_read_or_refused(http):
    content = json.dumps({"messages": MESSAGES, "max_tokens": 1})
    response = http.post("/v1/chat/completions", content=content)
    if response.status_code != 200:
        assert "application/json" in error_of(response)["message"]


@pytest.mark.parametrize(("method", "path", "status"), [("GET", "/nowhere", 404), ("DELETE", "/v1/models", 405)])
def test_paths_that_are_not_served(http, method, path, status):
    assert path in error_of(http.request(method, path), status)["message"]


def test_a_prompt_that_is_too_long_says_its_length_and_the_limit(http, chat_tokenizer):
    content = "hello " * 3000
    length = len(chat_tokenizer.encode_text(content)) + 2
    error = error_of(chat(http, messages=[{"role": "user", "content": content}]))
    assert str(length) in error["message"] and "2048" in error["message"]
    assert error["code"] == "context_length_exceeded"
    error = error_of(http.post("/v1/completions", json={"prompt": content}))
    assert str(length) in error["message"]


def test_prompts_of_a_megabyte_are_refused_quickly_and_the_server_goes_on(http):
    for text in ("x" * 1_000_000, "你好" * 200_000, "a b " * 260_000, "\n" * 1_000_000, "\t" * 200_000):
        error = error_of(chat(http, messages=[{"role": "user", "content": text + "?"}]))
        assert "at most 2048" in error["message"]
        assert error_of(http.post("/", json={"prompt": text + "?"}))["code"] == "context_length_exceeded"
    assert chat(http).status_code == 200


def test_blanks_are_counted_as_the_vocabulary_does(http):
    content = "a" + " " * 40_000 + "b"
    answer = chat(http, messages=[{"role": "user", "content": content}])
    assert answer.status_code == 200 and answer.json()["usage"]["prompt_tokens"] < 600


def test_tabs_are_refused_before_they_are_tokenized(http, chat_tokenizer, monkeypatch):
    monkeypatch.setattr(chat_tokenizer, "encode_text", lambda *given: pytest.fail("it was tokenized"))
    error = error_of(http.post("/v1/completions", json={"prompt": " \t" * 100_000}))
    assert int(re.search(r"at least (\d+) tokens", error["message"])[1]) >= 100_000


def test_other_blanks_are_one(http):
    assert chat(http, messages=[{"role": "user", "content": "a" + "\u3000" * 40_000 + "b"}]).status_code == 200


def test_a_body_over_the_limit_is_refused_before_it_is_read(http):
    error = error_of(http.post("/v1/completions", content=b"x" * (17 << 20)), 413)
    assert "16 MiB" in error["message"]

    def parts():
        for _ in range(17):
            yield b"x" * (1 << 20)

    response = http.post("/v1/completions", content=parts(), headers={"content-type": "application/json"})
    assert "16 MiB" in error_of(response, 413)["message"]


def test_an_answer_is_cut_at_the_models_length(http):
    response = http.post("/v1/completions", json={"prompt": "hi", "max_tokens": 10**6, "temperature": 0})
    assert response.status_code == 200 and response.json()["choices"][0]["finish_reason"] == "stop"


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        ([], "empty"),
        ([5, 99999], "99999"),
        ([5, -1], "-1"),
        ([3, 5], "padding"),
        ([5, 1676], "[gMASK]"),
        ([[5], "a"], ""),
    ],
)
def test_ids_that_are_no_prompt(http, prompt, said):
    assert said in error_of(http.post("/v1/completions", json={"prompt": prompt}))["message"]


def test_tokenize_and_detokenize(http, chat_tokenizer):
    text = "你好, hello\n\tworld  [gMASK]"
    answer = http.post("/tokenize", json={"prompt": text}).json()
    control = [chat_tokenizer.gmask_token_id, chat_tokenizer.bos_token_id]
    assert answer["tokens"] == [*chat_tokenizer.encode_text(text), *control]
    assert answer["count"] == len(answer["tokens"]) and answer["max_model_len"] == 2048
    bare = http.post("/tokenize", json={"prompt": text, "add_special_tokens": False}).json()["tokens"]
    assert http.post("/detokenize", json={"tokens": bare}).json() == {"prompt": text}
    messages = http.post("/tokenize", json={"messages": MESSAGES}).json()["tokens"]
    assert messages == chat_tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True, return_dict=False)
    error_of(http.post("/tokenize", json={}))
    error_of(http.post("/tokenize", json={"prompt": "a", "messages": MESSAGES}))
    assert "10000000" in error_of(http.post("/detokenize", json={"tokens": [10**7]}))["message"]


def test_request_ids(http):
    assert http.get("/health", headers={"X-Request-Id": "abc-1"}).headers["x-request-id"] == "abc-1"
    for bad in ("", "a b", "x" * 200):
        given = http.get("/health", headers={"X-Request-Id": bad}).headers["x-request-id"]
        assert given != bad and len(given) == 32
