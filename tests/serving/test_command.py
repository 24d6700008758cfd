"""The command: a real process on the tiny checkpoint, its signals, and what it says when it cannot start."""

import contextlib
import importlib.util
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import openai
import pytest
from conftest import wait_until

from faster_chatglm_6b.checkpoint import by_name
from faster_chatglm_6b.cli import build_parser, main
from faster_chatglm_6b.cli.serve import _names
from faster_chatglm_6b.serving.rows import making

ROOT = Path(__file__).resolve().parents[2]
LONG = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 1500, "ignore_eos": True, "stream": True}


@contextlib.contextmanager
def served(*options: str):
    """Run the command on a free port; give the process, its address and the lines of its log."""
    command = [sys.executable, "-m", "faster_chatglm_6b", "serve", "--tiny", "--device", "cpu", "--port", "0", *options]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    log: list[str] = []
    reader = threading.Thread(target=lambda: [log.append(line) for line in process.stderr])
    reader.start()
    try:
        line = process.stdout.readline()
        assert line.startswith("Serving "), "".join(log)
        yield process, re.search(r"http://\S+:\d+", line)[0], log
    finally:
        process.kill()
        process.wait(30)
        reader.join(30)


@pytest.fixture
def stream():
    """Return a function that asks for a long stream in a thread, and gives its lines as they come."""
    threads = []

    def ask(url, **fields):
        lines: list[str] = []

        def read():
            with contextlib.suppress(httpx.HTTPError):
                with httpx.stream(
                    "POST", f"{url}/v1/chat/completions", json={**LONG, **fields}, timeout=60
                ) as response:
                    [lines.append(line) for line in response.iter_lines() if line]

        threads.append(threading.Thread(target=read))
        threads[-1].start()
        while len(lines) < 3:
            assert threads[-1].is_alive()
            time.sleep(0.01)
        return lines, threads[-1]

    yield ask
    for thread in threads:
        thread.join(60)


def test_it_serves_and_sigterm_lets_answers_finish():
    options = ("--served-model-name", "mine", "--api-key", "a-secret", "--max-rows", "4", "--max-waiting", "2")
    with served(*options) as (process, url, log):
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="a-secret")
        assert [model.id for model in client.models.list()] == ["mine"]
        answer = client.chat.completions.create(model="mine", messages=LONG["messages"], max_tokens=2)
        assert answer.usage.completion_tokens == 2
        assert httpx.get(f"{url}/v1/models").status_code == 401
        # Four answers run, and two wait: all six may finish.
        seen, is_told = [], False
        chunks = client.chat.completions.create(
            model="mine", messages=LONG["messages"], max_tokens=20, n=6, stream=True,
            extra_body={"ignore_eos": True}, stream_options={"include_usage": True},
        )  # fmt: skip
        for chunk in chunks:
            seen.append(chunk)
            if not is_told and any(choice.delta.content for choice in chunk.choices):
                process.send_signal(signal.SIGTERM)
                is_told = True
        assert seen[-1].usage.completion_tokens == 6 * 20
        assert process.wait(30) == 0
    text = "".join(log)
    assert "Draining: 6 answers may finish within 30 s." in text and "Traceback" not in text
    assert "a-secret" not in text


def test_the_programs_of_the_page_and_answers_that_are_cut_at_the_timeout(stream):
    page = (ROOT / "docs" / "serving.md").read_text("utf-8")
    blocks = re.findall(r"^```(\w+)\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)
    (program,) = (text for kind, text in blocks if kind == "python")
    (command,) = (
        line for kind, text in blocks if kind == "sh" for line in text.splitlines() if line.startswith("curl ")
    )
    with served("--shutdown-timeout", "1", "--log-level", "warning") as (process, url, _):
        here = url.removeprefix("http://")
        done = subprocess.run(
            [sys.executable, "-c", program.replace("127.0.0.1:8000", here)], capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, done.stderr
        greeting, again = done.stdout.split("\n", 1)
        assert greeting.startswith("你好") and again
        words = shlex.split(command.replace("127.0.0.1:8000", here))
        if shutil.which(words[0]):
            done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=True)
            assert json.loads(done.stdout)["choices"][0]["message"]["content"]
        lines, _ = stream(url)
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 0
    assert "data: [DONE]" not in lines


def test_a_second_signal_ends_it_at_once(stream):
    with served("--shutdown-timeout", "50") as (process, url, log):
        lines, _ = stream(url)
        process.send_signal(signal.SIGTERM)
        wait_until(lambda: any("Draining" in line for line in log))
        wait_until(lambda: is_refused(url))
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 128 + signal.SIGTERM
    assert "data: [DONE]" not in lines


def is_refused(url: str) -> bool:
    """Tell whether a new connection is refused."""
    host, port = url.removeprefix("http://").split(":")
    try:
        socket.create_connection((host, int(port)), 5).close()
    except ConnectionRefusedError:
        return True
    return False


def refused(words: list[str], capsys) -> str:
    """Return the one line that is said instead of starting."""
    with contextlib.suppress(SystemExit):
        assert main(["serve", *words]) != 0
    (line,) = capsys.readouterr().err.splitlines()
    return line


@pytest.mark.parametrize("missing", ["fastapi", "uvicorn", "prometheus_client"])
def test_a_missing_library_is_one_sentence(missing, capsys, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == missing else find(name, *rest))
    assert refused(["--tiny"], capsys) == (f'serve needs {missing}: install the extra with pip install -e ".[serve]".')


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--port", "70000"], "'70000' is no port"),
        (["--port", "-1"], "no whole number"),
        (["--max-rows", "0"], "'0' is too few"),
        (["--memory", "1.5"], "'1.5' is no share"),
        (["--max-waiting", "many"], "'many' is no whole number"),
        (["--shutdown-timeout", "1.5"], "'1.5' is no whole number"),
        (["--log-level", "loud"], "loud"),
        (["--speculate", "5"], "'5' is no draft: 0, 3, 7 or auto"),
        (["--api-key", " ", "--tiny"], "--api-key is empty"),
        (["--served-model-name", "", "--tiny"], "--served-model-name is empty"),
        (["a", "--tiny"], "More than one checkpoint is named"),
    ],
)
def test_options_that_cannot_work_are_one_sentence(words, said, capsys, monkeypatch):
    monkeypatch.setattr(by_name, "load", lambda *arguments: pytest.fail("loaded before the options were checked"))
    assert said in refused(words, capsys)


def test_a_taken_port_and_too_little_memory_are_one_sentence(capsys, monkeypatch):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        code = main(["serve", "--tiny", "--device", "cpu", "--port", str(port)])
    last = capsys.readouterr().err.splitlines()[-1]
    assert code == 1 and last == f"The server could not be started on 127.0.0.1:{port}."
    monkeypatch.setattr(making, "free_bytes", lambda device: 1 << 20)
    assert main(["serve", "--tiny", "--device", "cpu"]) == 1
    assert "1.0 MiB of memory is free" in capsys.readouterr().err.splitlines()[-1]


def test_names_for_clients():
    def names(*words):
        return _names(build_parser().parse_args(["serve", *words]))

    assert names() == names("THUDM/chatglm-6b") == ("chatglm-6b", "THUDM/chatglm-6b")
    assert names("--tiny") == ("tiny_chatglm",) and names("/models/mine/") == ("mine", "/models/mine/")


def test_keys_of_the_environment(monkeypatch):
    from faster_chatglm_6b.serving.api import server

    seen = []
    monkeypatch.setattr(server, "serve", lambda model, tokenizer, settings: seen.append(settings) or 0)
    monkeypatch.setenv("FASTER_CHATGLM_6B_API_KEY", "one, two,")
    assert main(["serve", "--tiny", "--device", "cpu"]) == 0
    assert main(["serve", "--tiny", "--device", "cpu", "--api-key", "three"]) == 0
    assert [settings.keys for settings in seen] == [("one", "two"), ("three",)]
    assert "one" not in repr(seen[0])
