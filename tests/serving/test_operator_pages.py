"""What operators see: metrics, health, version, keys, and the access log."""

import json
import logging

import httpx
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families
from scripted_rows import ScriptedRows

import faster_chatglm_6b

BODY = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 8, "ignore_eos": True}


def numbers(url: str) -> dict[tuple, float]:
    """Return the samples of /metrics by name and by the labels that differ."""
    families = text_string_to_metric_families(httpx.get(f"{url}/metrics").text)
    samples = [sample for family in families for sample in family.samples]
    assert all(sample.labels["model_name"] == "chatglm-6b" for sample in samples)
    return {(sample.name, sample.labels.get("finished_reason")): sample.value for sample in samples}


def test_metrics_have_vllms_names_and_true_values(scripted):
    with scripted(ScriptedRows(3, 1024, pause=0.002)) as (url, _, rows):
        before = numbers(url)
        for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"):
            assert before[f"vllm:{name}", None] == 0
        made = 0
        prompts = 0
        for fields in ({}, {"n": 3}, {"stream": True}, {"max_tokens": 1}):
            answer = httpx.post(f"{url}/v1/chat/completions", json=BODY | fields, timeout=30)
            count = fields.get("n", 1)
            made += count * fields.get("max_tokens", 8)
            prompts += count * len(rows.started[-1].ids)
            assert answer.status_code == 200
        text = httpx.post(f"{url}/v1/chat/completions", json=BODY | {"seed": 3}, timeout=30).json()
        stop = text["choices"][0]["message"]["content"][2:5]
        stopped = httpx.post(f"{url}/v1/chat/completions", json=BODY | {"seed": 3, "stop": stop}, timeout=30).json()
        assert stopped["choices"][0]["finish_reason"] == "stop"
        made += 8 + stopped["usage"]["completion_tokens"]
        prompts += 2 * len(rows.started[-1].ids)
        after = numbers(url)
        assert after["vllm:generation_tokens_total", None] == made
        assert after["vllm:prompt_tokens_total", None] == prompts
        assert after["vllm:request_success_total", "length"] == 7
        assert after["vllm:request_success_total", "stop"] == 1
        for name in ("time_to_first_token", "e2e_request_latency", "request_queue_time", "request_prefill_time"):
            assert after[f"vllm:{name}_seconds_count", None] == 8
        assert after["vllm:request_decode_time_seconds_count", None] == 8
        assert 0 < after["vllm:inter_token_latency_seconds_count", None] <= made - 8
        seconds = {
            name: after[f"vllm:{name}_seconds_sum", None] for name in ("time_to_first_token", "request_decode_time")
        }
        assert sum(seconds.values()) == pytest.approx(after["vllm:e2e_request_latency_seconds_sum", None], abs=0.2)
        assert "# TYPE vllm:time_to_first_token_seconds histogram" in httpx.get(f"{url}/metrics").text


def test_gauges_while_answers_are_made(scripted):
    with scripted(ScriptedRows(2, 1024, pause=0.01)) as (url, _, rows):
        with httpx.stream(
            "POST", f"{url}/v1/chat/completions", json={**BODY, "n": 5, "max_tokens": 500, "stream": True}
        ):
            while rows.steps < 3:
                pass
            now = numbers(url)
        assert (now["vllm:num_requests_running", None], now["vllm:num_requests_waiting", None]) == (2, 3)
        pages = -(-(len(rows.started[0].ids) + 500) // 16)
        assert now["vllm:kv_cache_usage_perc", None] == pytest.approx(2 * pages / 1024)


def test_keys(scripted):
    with scripted(keys=["secret-1", "schlüssel"]) as (url, _, _):
        for path in ("/health", "/version", "/metrics"):
            assert httpx.get(url + path).status_code == 200
        for headers in (
            {},
            {"Authorization": "Bearer wrong"},
            {"Authorization": "secret-1"},
            {"Authorization": "Basic secret-1"},
        ):
            for path in ("/v1/chat/completions", "/v1/completions", "/", "/stream", "/tokenize", "/v1/models", "/docs"):
                refused = httpx.post(url + path, json=BODY, headers=headers)
                assert refused.status_code == 401 and refused.json()["error"]["code"] == "invalid_api_key"
        with pytest.raises(openai.AuthenticationError):
            openai.OpenAI(base_url=f"{url}/v1", api_key="wrong", max_retries=0).models.list()
        assert len(openai.OpenAI(base_url=f"{url}/v1", api_key="secret-1").models.list().data) == 1
        for key in ("secret-1", "schlüssel"):
            header = {"Authorization": f"Bearer {key}".encode()}
            assert httpx.post(f"{url}/v1/chat/completions", json=BODY, headers=header).status_code == 200


def test_the_access_log_is_one_json_object_per_request(scripted, caplog):
    with caplog.at_level(logging.INFO, "faster_chatglm_6b.serving.access"), scripted() as (url, _, _):
        httpx.post(f"{url}/v1/chat/completions", json=BODY, headers={"X-Request-Id": "one"})
        httpx.post(f"{url}/v1/chat/completions", json=BODY | {"stream": True, "n": 2}, headers={"X-Request-Id": "two"})
        httpx.post(f"{url}/v1/chat/completions", json={}, headers={"X-Request-Id": "three"})
    lines = {line["request_id"]: line for line in (json.loads(record.getMessage()) for record in caplog.records)}
    one, two, three = (lines[name] for name in ("one", "two", "three"))
    assert (one["method"], one["path"], one["status"], one["finish"]) == ("POST", "/v1/chat/completions", 200, "length")
    assert one["completion_tokens"] == 8 and one["prompt_tokens"] > 2 and one["ms"] > 0
    assert two["completion_tokens"] == 16 and two["prompt_tokens"] == one["prompt_tokens"]
    assert three["status"] == 400 and "completion_tokens" not in three


def test_version_and_openapi(scripted):
    with scripted() as (url, _, _):
        assert httpx.get(f"{url}/version").json() == {"version": faster_chatglm_6b.__version__}
        schema = httpx.get(f"{url}/openapi.json").json()
        assert {"/v1/chat/completions", "/v1/completions", "/v1/models", "/tokenize", "/health", "/", "/stream"} <= set(
            schema["paths"]
        )
