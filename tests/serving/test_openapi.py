"""What /openapi.json promises holds for requests that schemathesis makes of it, valid ones and others."""

import httpx
import pytest
from hypothesis import given, seed
from property_profiles import examples

schemathesis = pytest.importorskip("schemathesis", reason='schemathesis is not installed: pip install -e ".[clients]"')

from conftest import running  # noqa: E402
from schemathesis import GenerationMode  # noqa: E402
from scripted_rows import ScriptedRows  # noqa: E402

READING = ["GET /v1/models", "GET /v1/models/{name}", "GET /health", "GET /version", "GET /metrics"]
SENDING = [
    *("POST /v1/chat/completions", "POST /v1/completions", "POST /tokenize", "POST /detokenize", "POST /"),
    "POST /stream",
]
VALID, INVALID = GenerationMode.POSITIVE, GenerationMode.NEGATIVE
# Answers of thousands of tokens would take minutes.
SHORT = {"max_tokens": 5, "max_completion_tokens": 5, "max_length": 300, "min_tokens": 1, "n": 2}
# A schema cannot say all that a request must be, such as that its ids are the vocabulary's.
BEYOND_A_SCHEMA = "positive_data_acceptance"


@pytest.fixture(scope="module")
def url(chat_model, chat_tokenizer):
    from faster_chatglm_6b.serving.api.app import build_app

    with running(build_app(chat_model, chat_tokenizer, ScriptedRows(8, 4096))) as url:
        yield url


@pytest.fixture(scope="module")
def schema(url):
    return schemathesis.openapi.from_url(f"{url}/openapi.json")


def test_every_operation_is_tried(schema):
    assert {result.ok().label for result in schema.get_all_operations()} == {*READING, *SENDING}


@pytest.mark.parametrize(
    ("label", "mode"),
    [*((label, VALID) for label in READING + SENDING), *((label, INVALID) for label in SENDING)],
)
def test_answers_are_as_they_are_described(schema, label, mode):
    (operation,) = (result.ok() for result in schema.get_all_operations() if result.ok().label == label)
    beyond = [schemathesis.checks.CHECKS.get_one(BEYOND_A_SCHEMA)]
    seen = []

    @seed(1)
    @given(case=operation.as_strategy(generation_mode=mode))
    @examples(8, 500, shrink=False)
    def check(case):
        for name, most in SHORT.items() if isinstance(case.body, dict) else ():
            if mode == VALID or isinstance(case.body.get(name), int):
                case.body[name] = most
        seen.append(case.call_and_validate(timeout=60, excluded_checks=beyond).status_code)

    check()
    assert seen and 500 not in seen


def test_errors_are_described_in_the_form_that_they_have(url):
    paths = httpx.get(f"{url}/openapi.json").json()["paths"]
    for path, methods in paths.items():
        for operation in methods.values():
            responses = operation["responses"]
            assert {"4XX", "5XX"} <= responses.keys() and "422" not in responses, path
            assert responses["4XX"]["content"]["application/json"]["schema"]["$ref"].endswith("/ErrorBody")
    assert "text/event-stream" in paths["/stream"]["post"]["responses"]["200"]["content"]
    assert {"application/json", "text/event-stream"} <= set(
        paths["/v1/chat/completions"]["post"]["responses"]["200"]["content"]
    )
