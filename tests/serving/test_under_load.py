"""Many clients at once, clients that leave, clients that do not read, more than the server takes, and failures."""

import asyncio
import json
import random
import socket
import threading

import httpx
import openai
import pytest
from conftest import wait_until
from scripted_rows import ScriptedRows

QUERIES = ["你好", "What is int8?", "1+2", "Who are you?"]
LONG = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 1500, "ignore_eos": True}


def request(path: str, content: bytes) -> bytes:
    """Return a request as bytes, for a client that is only a socket."""
    head = ("POST %s HTTP/1.1", "Host: x", "Content-Type: application/json", "Content-Length: %d", "", "")
    return "\r\n".join(head).encode() % (path.encode(), len(content)) + content


def test_64_clients_get_what_chat_gives_alone(plain_url, chat_model, chat_tokenizer):
    limit = 7
    alone = {
        query: chat_model.chat(chat_tokenizer, query, do_sample=False, max_new_tokens=limit, max_length=None)[0]
        for query in QUERIES
    }

    async def all_clients():
        order = random.Random(3)
        async with openai.AsyncOpenAI(base_url=f"{plain_url}/v1", api_key="EMPTY", max_retries=0) as client:

            async def one(number):
                await asyncio.sleep(order.random())
                query = QUERIES[number % len(QUERIES)]
                messages = [{"role": "user", "content": query}]
                settings = {"model": "chatglm-6b", "messages": messages, "temperature": 0, "max_tokens": limit}
                if number % 3:
                    answer = await client.chat.completions.create(**settings)
                    return query, answer.choices[0].message.content
                stream = await client.chat.completions.create(stream=True, **settings)
                parts = [chunk.choices[0].delta.content or "" async for chunk in stream]
                return query, "".join(parts)

            return await asyncio.gather(*(one(number) for number in range(64)))

    answers = asyncio.run(all_clients())
    assert len(answers) == 64 and all(alone[query] == text for query, text in answers)


def test_chat_of_another_thread_takes_turns(plain_url, chat_model, chat_tokenizer):
    expected = chat_model.chat(chat_tokenizer, "1+2", do_sample=False)
    seen = []
    body = {**LONG, "max_tokens": 30, "temperature": 0}
    thread = threading.Thread(
        target=lambda: seen.append(httpx.post(f"{plain_url}/v1/chat/completions", json=body, timeout=60))
    )
    thread.start()
    for _ in range(3):
        assert chat_model.chat(chat_tokenizer, "1+2", do_sample=False) == expected
    thread.join(60)
    assert seen[0].json()["usage"]["completion_tokens"] == 30


@pytest.mark.parametrize("is_stream", [True, False])
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/", "/stream"])
def test_a_client_that_leaves_frees_its_row_within_four_steps(scripted, is_stream, path):
    body = {**LONG, "stream": is_stream, "prompt": "hi", "n": 1}
    if "chat" in path:
        del body["prompt"]
    with scripted(ScriptedRows(2, 1024, pause=0.05)) as (url, service, rows):
        host, port = url.removeprefix("http://").split(":")
        content = json.dumps(body).encode()
        with socket.create_connection((host, int(port))) as client:
            client.sendall(request(path, content))
            wait_until(lambda: rows.occupied == 1 and rows.steps >= 3)
        left = rows.steps
        wait_until(lambda: rows.occupied == 0)
        assert rows.steps - left <= 4
        wait_until(lambda: service.door.inside == 0)
        text = httpx.get(f"{url}/metrics").text
        assert 'vllm:request_success_total{finished_reason="abort",model_name="chatglm-6b"} 1.0' in text


def test_all_answers_of_a_client_that_leaves_end(scripted):
    with scripted(ScriptedRows(2, 1024, pause=0.02)) as (url, service, rows):
        with httpx.stream("POST", f"{url}/v1/chat/completions", json={**LONG, "n": 5, "stream": True}) as response:
            next(response.iter_lines())
            wait_until(lambda: service.engine.running == 2 and service.engine.waiting == 3)
        wait_until(lambda: service.engine.running == service.engine.waiting == 0)


def test_a_stop_string_frees_the_row_at_once(scripted, chat_tokenizer):
    with scripted(ScriptedRows(2, 1024, pause=0.01)) as (url, _, rows):
        body = {**LONG, "seed": 1, "temperature": 1}
        first = httpx.post(f"{url}/v1/chat/completions", json={**body, "max_tokens": 12}, timeout=30).json()
        text = first["choices"][0]["message"]["content"]
        before = rows.steps
        answer = httpx.post(f"{url}/v1/chat/completions", json={**body, "stop": text[3:6]}, timeout=30).json()
        assert answer["choices"][0]["finish_reason"] == "stop" and answer["usage"]["completion_tokens"] <= 12
        wait_until(lambda: rows.occupied == 0)
        assert rows.steps - before <= 12 + 4


def test_a_reader_that_stops_reading_holds_up_nobody(scripted):
    with scripted(ScriptedRows(4, 1024, pause=0.001)) as (url, service, rows):
        host, port = url.removeprefix("http://").split(":")
        content = json.dumps({**LONG, "stream": True, "logprobs": True, "n": 2}).encode()
        client = socket.socket()
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        with client:
            client.connect((host, int(port)))
            client.sendall(request("/v1/chat/completions", content))
            wait_until(lambda: rows.occupied == 2)
            others = httpx.post(f"{url}/v1/chat/completions", json={**LONG, "max_tokens": 20}, timeout=30).json()
            assert others["usage"]["completion_tokens"] == 20
            # Its own rows end by their limit, though nobody reads.
            wait_until(lambda: service.engine.running == 0)
        wait_until(lambda: service.door.inside == 0)


def test_too_many_are_turned_away_at_the_door(scripted):
    async def crowd(url, service):
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=url, timeout=60, limits=limits) as client:
            body = {**LONG, "max_tokens": 25}
            answers = await asyncio.gather(*(client.post("/v1/chat/completions", json=body) for _ in range(20)))
            refused = [answer for answer in answers if answer.status_code == 429]
            served = [answer for answer in answers if answer.status_code == 200]
            assert len(served) == 5 and len(refused) == 15
            for answer in refused:
                assert int(answer.headers["retry-after"]) >= 1
                assert (
                    answer.json()["error"]["code"] == "queue_full"
                    and answer.json()["error"]["type"] == "rate_limit_error"
                )
            assert all(answer.json()["usage"]["completion_tokens"] == 25 for answer in served)
            # A request for more answers than may wait is one too many by itself.
            assert (await client.post("/v1/chat/completions", json={**body, "n": 6})).status_code == 429
            assert (await client.post("/v1/chat/completions", json={**body, "n": 5})).status_code == 200
            short = {"prompt": " hi ", "max_tokens": 2, "max_length": 8}
            for path in ("/v1/completions", "/", "/stream"):
                assert (await client.post(path, json=short)).status_code == 200

    with scripted(ScriptedRows(2, 1024, pause=0.01), most_waiting=3) as (url, service, _):
        asyncio.run(crowd(url, service))


def test_the_door_counts_before_the_text_is_read(scripted):
    """While one long text is tokenized, the others are counted too."""
    with scripted(most_waiting=0, rows=ScriptedRows(1, 1024)) as (url, service, _):
        gate = threading.Event()
        service.prompts._thread.submit(gate.wait)
        seen = []
        body = {**LONG, "max_tokens": 1}
        thread = threading.Thread(
            target=lambda: seen.append(httpx.post(f"{url}/v1/chat/completions", json=body, timeout=30))
        )
        thread.start()
        wait_until(lambda: service.door.inside == 1)
        assert service.engine.running == service.engine.waiting == 0
        assert httpx.post(f"{url}/v1/chat/completions", json=body).status_code == 429
        # The loop is free meanwhile.
        assert httpx.get(f"{url}/health").status_code == 200
        gate.set()
        thread.join(30)
        assert seen[0].status_code == 200


@pytest.mark.parametrize("is_stream", [True, False])
def test_a_request_that_fails_in_the_engine_leaves_the_others(scripted, is_stream):
    def fails(request, index):
        return RuntimeError("a fault of this row") if request.seed == 13 and index == 3 else None

    with scripted(ScriptedRows(4, 1024, pause=0.005, fails=fails)) as (url, _, rows):
        seen = []
        body = {**LONG, "max_tokens": 60}
        thread = threading.Thread(
            target=lambda: seen.append(httpx.post(f"{url}/v1/chat/completions", json=body, timeout=30))
        )
        thread.start()
        wait_until(lambda: rows.occupied == 1)
        failed = httpx.post(f"{url}/v1/chat/completions", json={**body, "seed": 13, "stream": is_stream}, timeout=30)
        if is_stream:
            *_, error, last = [line for line in failed.text.splitlines() if line]
            assert failed.status_code == 200 and last == "data: [DONE]"
            error = json.loads(error.removeprefix("data: "))["error"]
            with pytest.raises(openai.APIError, match="a fault of this row"):
                client = openai.OpenAI(base_url=f"{url}/v1", api_key="EMPTY", max_retries=0)
                settings = {"messages": LONG["messages"], "max_tokens": 60, "seed": 13, "stream": True}
                list(client.chat.completions.create(model="chatglm-6b", extra_body={"ignore_eos": True}, **settings))
        else:
            assert failed.status_code == 500
            error = failed.json()["error"]
        assert error["code"] == "engine_error" and "a fault of this row" in error["message"]
        thread.join(30)
        assert seen[0].json()["usage"]["completion_tokens"] == 60


def test_seeded_answers_with_n_do_not_depend_on_the_load(scripted):
    body = {**LONG, "max_tokens": 15, "seed": 5, "n": 3, "temperature": 1}
    with scripted(ScriptedRows(4, 1024, lag=True)) as (url, _, _):

        def texts():
            answer = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=30).json()
            return [choice["message"]["content"] for choice in answer["choices"]]

        alone = texts()
        threads = [
            threading.Thread(
                target=httpx.post, args=(f"{url}/v1/chat/completions",), kwargs={"json": {**LONG, "max_tokens": 100}}
            )
            for _ in range(3)
        ]
        for thread in threads:
            thread.start()
        assert texts() == alone and len(set(alone)) == 3
        for thread in threads:
            thread.join(30)


def test_a_draining_server_turns_new_requests_away(scripted):
    with scripted(ScriptedRows(2, 1024, pause=0.002)) as (url, service, rows):
        seen = []
        body = {**LONG, "max_tokens": 100}
        thread = threading.Thread(
            target=lambda: seen.append(httpx.post(f"{url}/v1/chat/completions", json=body, timeout=30))
        )
        thread.start()
        wait_until(lambda: rows.occupied == 1)
        service.door.is_draining = True
        refused = httpx.post(f"{url}/v1/chat/completions", json=body)
        assert refused.status_code == 503 and refused.headers["retry-after"]
        assert httpx.get(f"{url}/health").status_code == 503
        thread.join(30)
        assert seen[0].json()["usage"]["completion_tokens"] == 100


def test_an_engine_that_has_died_says_so(scripted):
    with scripted() as (url, service, rows):
        rows.turn, rows.stop = None, lambda row: None  # the row never begins, and is stopped all the same
        answer = httpx.post(f"{url}/v1/chat/completions", json={**LONG, "max_tokens": 3}, timeout=30)
        assert answer.status_code == 500
        assert httpx.get(f"{url}/health").status_code == 503
        assert httpx.post(f"{url}/v1/chat/completions", json=LONG).status_code == 503
        service.engine._scheduler.end(next(iter(service.engine._scheduler._running)))
