"""``examples/web_demo.py --api`` shows the answers of a server, and a page and an API share one model."""

import os
import re
import subprocess
import sys
import time

import httpx
import pytest

pytest.importorskip("gradio", reason='gradio is not installed: pip install -e ".[web]" (it needs transformers 5)')
pytest.importorskip("playwright", reason='playwright is not installed: pip install -e ".[dev]"')

from playwright.sync_api import expect, sync_playwright
from test_web_demo import CHROMIUM, GREETING, in_browser, visit
from web_page import FLAGS, SOON
from web_server import ROOT, serving

from faster_chatglm_6b.cli.errors import CommandError

sys.path.append(str(ROOT / "examples"))

import web_demo  # noqa: E402
from _remote import RemoteModel  # noqa: E402

GREEDY = {"max_length": 2048, "do_sample": False}


@pytest.fixture(scope="module")
def api():
    """Run the server on the tiny checkpoint, with a key; give its address."""
    words = ("serve", "--tiny", "--device", "cpu", "--port", "0", "--api-key", "a-secret", "--log-level", "warning")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "faster_chatglm_6b", *words]
    server = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    try:
        yield re.search(r"http://\S+:\d+", server.stdout.readline())[0]
    finally:
        server.kill()
        server.wait(30)


@pytest.fixture
def remote(api):
    return RemoteModel(f"{api}/v1", "a-secret")


def running(api: str) -> float:
    return float(re.search(r"num_requests_running\{.*\} (\S+)", httpx.get(f"{api}/metrics").text)[1])


def test_a_server_says_what_its_model_would(remote, api):
    """The trained toy's own answers are those of test_web_demo.py."""
    assert remote.config.max_sequence_length == 2048
    steps = [*remote.stream_chat(None, "你好", history=[], **GREEDY)]
    assert len(steps) > 5 and steps[-1] == (GREETING, [["你好", GREETING]])
    assert all(later.startswith(earlier) for (earlier, _), (later, _) in zip(steps, steps[1:], strict=False))
    *_, (response, history) = remote.stream_chat(None, "用英文再说一遍", history=steps[-1][1], **GREEDY)
    assert response == "Hello! I am a tiny demo model of faster_chatglm_6b. How can I help you?"
    assert [query for query, _ in history] == ["你好", "用英文再说一遍"]


def test_a_stream_that_is_closed_ends_the_answer(remote, api):
    stream = remote.stream_chat(None, "Tell me a joke", history=[], max_length=2048, temperature=5.0, top_p=1.0)
    next(stream)
    assert running(api) == 1
    stream.close()
    end = time.monotonic() + 10
    while running(api):
        assert time.monotonic() < end
        time.sleep(0.05)


def test_refusals_are_the_servers_sentences(remote, api):
    with pytest.raises(ValueError, match="^The prompt has .* tokens, but max_length asks for at most 64 of prompt"):
        next(remote.stream_chat(None, "hello " * 100, history=[], max_length=64))
    with pytest.raises(CommandError, match="API key is missing or wrong"):
        RemoteModel(api, "wrong")
    with pytest.raises(CommandError, match="no server answers there"):
        RemoteModel("http://127.0.0.1:9")
    with pytest.raises(CommandError, match="no server answers there"):
        RemoteModel("nonsense")


def test_a_key_of_the_environment(api, monkeypatch):
    monkeypatch.setenv("FASTER_CHATGLM_6B_API_KEY", "a-secret, another")
    assert RemoteModel(api).config.max_sequence_length == 2048


@in_browser
def test_the_page_of_a_server(api, tmp_path):
    """It answers beside a client of the API, and shows the server's refusals."""
    with serving(tmp_path, "--api", api, "--api-key", "a-secret", device=None) as address, sync_playwright() as tool:
        browser = tool.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        visitor = visit(browser, address)
        visitor.ask("你好", GREETING)
        body = {"prompt": "你好", "temperature": 0}
        answer = httpx.post(api, json=body, headers={"Authorization": "Bearer a-secret"}, timeout=60)
        assert answer.json()["response"] == GREETING
        visitor.slide("Maximum length", 64)
        visitor.say("hello " * 100)
        expect(visitor.page.get_by_text("max_length asks for at most 64")).to_be_visible(timeout=SOON)
        browser.close()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--api", "http://127.0.0.1:9", "--tiny"], "leave --tiny out"),
        (["--api", "http://127.0.0.1:9", "--bits", "4"], "leave --bits out"),
        (["--api-key", "k", "--tiny"], "--api-key is for the server at --api URL"),
    ],
)
def test_options_that_cannot_work_are_one_sentence(words, said, capsys):
    with pytest.raises(SystemExit) as stop:
        web_demo.parse_arguments(words)
    assert stop.value.code == 2 and said in capsys.readouterr().err


def test_no_model_is_loaded_when_a_server_is_named(api, monkeypatch):
    monkeypatch.setitem(sys.modules, "faster_chatglm_6b.cli.checkpoint", None)
    _, model = web_demo.load(web_demo.parse_arguments(["--api", api, "--api-key", "a-secret"]))
    assert isinstance(model, RemoteModel)
