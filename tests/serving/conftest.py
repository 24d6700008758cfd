"""The trained tiny checkpoint, and applications over it on a real port."""

import contextlib
import socket
import threading
import time
from pathlib import Path

import pytest
import uvicorn

TINY = Path(__file__).resolve().parents[2] / "examples" / "tiny_chatglm"


@pytest.fixture(scope="session")
def chat_model():
    """Load the trained tiny checkpoint in float32."""
    from faster_chatglm_6b.modeling_chatglm import ChatGLMForConditionalGeneration

    return ChatGLMForConditionalGeneration.from_pretrained(TINY).float().eval()


@pytest.fixture(scope="session")
def chat_tokenizer():
    """Load the trained tiny checkpoint's tokenizer."""
    from faster_chatglm_6b.tokenization_chatglm import ChatGLMTokenizer

    return ChatGLMTokenizer.from_pretrained(TINY)


@contextlib.contextmanager
def running(app):
    """Run an application on a free port; give its address, and check afterwards that every row is free."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning", timeout_graceful_shutdown=5))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    service = app.state.service
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
        wait_until(lambda: service.engine.running == service.engine.waiting == service.door.inside == 0)
        assert service.engine.pages_used == 0
    finally:
        server.should_exit = True
        thread.join(30)
    assert not thread.is_alive()


def free_port():
    """Find a port that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def wait_until(holds, seconds=60.0):
    """Wait until something holds, and fail if it never does."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.005)


@pytest.fixture(scope="session")
def plain_app(chat_model, chat_tokenizer):
    """The application over the real model, with room for 16 rows."""
    from faster_chatglm_6b.serving.api.app import build_app
    from faster_chatglm_6b.serving.rows.plain import PlainRows

    return build_app(chat_model, chat_tokenizer, PlainRows(chat_model, 16, 1024), ["chatglm-6b", "THUDM/chatglm-6b"])


@pytest.fixture(scope="session")
def plain_url(plain_app):
    """The address of ``plain_app``."""
    with running(plain_app) as url:
        yield url


@pytest.fixture
def scripted(chat_model, chat_tokenizer):
    """Return a context manager that runs an application over ``ScriptedRows``; arguments as of ``build_app``."""
    from scripted_rows import ScriptedRows

    from faster_chatglm_6b.serving.api.app import build_app

    @contextlib.contextmanager
    def run(rows=None, **settings):
        rows = rows or ScriptedRows(pages=1024)
        app = build_app(chat_model, chat_tokenizer, rows, **settings)
        with running(app) as url:
            yield url, app.state.service, rows
        assert rows.faults == []

    return run
