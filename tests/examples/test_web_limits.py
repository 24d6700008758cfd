"""The web demo's server, without a browser, limits what it takes, how much of it, and how many wait."""

import asyncio
import http.client
import json
import socket
import sys
import urllib.error
import urllib.request
from pathlib import Path
from urllib.parse import urlsplit

import pytest

pytest.importorskip("gradio", reason='gradio is not installed: pip install -e ".[web]" (it needs transformers 5)')

from babbler import make_babbler
from web_server import run, serving

sys.path.append(str(Path(__file__).resolve().parents[2] / "examples"))

from _guard import LARGEST_BODY, ROUTES, Guard  # noqa: E402
from web_demo import WAITING  # noqa: E402

ANSWER_TAKES = 5  # the answering event's inputs: text, history, maximum length, top p, temperature


@pytest.fixture(scope="module")
def server(tmp_path_factory, tiny_dir):
    """Serve a model whose answers do not end by themselves."""
    folder = tmp_path_factory.mktemp("limits")
    with serving(folder, "--model", str(make_babbler(tiny_dir, folder / "checkpoint"))) as address:
        yield address


def post(address: str, path: str, body: bytes, content: str = "application/json") -> int:
    request = urllib.request.Request(address + path, body, {"Content-Type": content})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code


def send(address: str, session: str, query, max_length=64, history=None) -> int:
    """Join the queue as the page does, and return the status."""
    with urllib.request.urlopen(f"{address}config", timeout=60) as answer:
        events = json.load(answer)["dependencies"]
    (event,) = (one["id"] for one in events if len(one["inputs"]) == ANSWER_TAKES)
    data = {"data": [query, history, max_length, 0.7, 0], "fn_index": event, "session_hash": session}
    return post(address, "gradio_api/queue/join", json.dumps(data).encode())


def outcome(address: str, session: str) -> str:
    with urllib.request.urlopen(f"{address}gradio_api/queue/data?session_hash={session}", timeout=120) as answer:
        (last,) = (line for line in answer.read().decode().splitlines() if '"process_completed"' in line)
    return last


UPLOAD = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.txt"\r\n\r\nhello\r\n--x--\r\n'


@pytest.mark.parametrize(
    "path",
    ["gradio_api/upload", "gradio_api/upload/", "upload", "/gradio_api/upload", "gradio_api//upload"]
    + ["gradio_api/run/predict", "gradio_api/call/answer", "gradio_api/component_server", "gradio_api/queue/../upload"],
)
def test_nothing_can_be_uploaded_or_called(server, path):
    assert post(server, path, UPLOAD, "multipart/form-data; boundary=x") == 404


def test_a_message_that_is_too_long_is_refused_by_its_length(server):
    assert send(server, "long", "x" * 40_000) == 200
    assert "The message has 40000 characters, but at most 32768 can be asked at once" in outcome(server, "long")


def test_a_request_that_is_too_large_is_refused_before_it_is_read(server):
    assert send(server, "larger", "x" * LARGEST_BODY) == 413
    connection = http.client.HTTPConnection(urlsplit(server).netloc, timeout=60)
    connection.putrequest("POST", "/gradio_api/queue/join")
    connection.putheader("Transfer-Encoding", "chunked")
    connection.endheaders()
    piece = b"%x\r\n%b\r\n" % (LARGEST_BODY, b"x" * LARGEST_BODY)
    connection.send(piece)
    connection.send(b"1\r\nx\r\n")
    assert connection.getresponse().status == 413
    connection.close()


@pytest.mark.parametrize(("query", "max_length"), [("hi", 10**9), ("hi", -1), (None, 64), ("hi", "<b>")])
def test_values_that_no_page_sends_are_refused(server, query, max_length):
    session = f"odd-{query}-{max_length}".replace("<", "").replace(">", "")
    assert send(server, session, query, max_length) == 200
    done = json.loads(outcome(server, session).removeprefix("data: "))
    assert done["success"] is False or query is None


def test_the_queue_is_full_at_a_number(server):
    codes = [send(server, f"waiting-{number}", "hello", 2048) for number in range(2 * WAITING)]
    # The request that is being answered may have left the queue, or not yet.
    assert codes.count(200) in (WAITING, WAITING + 1) and set(codes) == {200, 503}
    assert codes == sorted(codes)


def replies(scope: dict, *messages: dict) -> tuple[list[dict], list[bytes]]:
    """Return what ``Guard`` sends, and the bodies that the application inside it sees."""
    sent, seen, waiting = [], [], list(messages)

    async def application(scope, receive, send):
        seen.append((await receive())["body"])

    async def receive():
        return waiting.pop(0)

    async def send(message):
        sent.append(message)

    asyncio.run(Guard(application)(scope, receive, send))
    return sent, seen


@pytest.mark.parametrize("path", ROUTES)
def test_a_body_in_pieces_comes_through_whole(path):
    pieces = [{"type": "http.request", "body": b"ab", "more_body": True}, {"type": "http.request", "body": b"c"}]
    assert replies({"type": "http", "method": "POST", "path": path}, *pieces) == ([], [b"abc"])
    largest = {"type": "http.request", "body": b"x" * LARGEST_BODY}
    assert replies({"type": "http", "method": "POST", "path": path}, largest)[1] == [largest["body"]]


@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "DELETE", "post"])
def test_other_routes_are_closed_to_every_method_that_sends(method):
    sent, seen = replies({"type": "http", "method": method, "path": "/gradio_api/upload"})
    assert sent[0]["status"] == 404 and seen == []


def test_reading_stops_at_the_limit():
    """The message after that is not asked for: it would be missing here."""
    piece = {"type": "http.request", "body": b"x" * (LARGEST_BODY // 2 + 1), "more_body": True}
    sent, seen = replies({"type": "http", "method": "POST", "path": "/login"}, piece, piece)
    assert sent[0]["status"] == 413 and seen == []


@pytest.mark.parametrize("port", ["99999", "0", "-1", "x", "65536", "²", "9" * 5000])
def test_a_port_that_is_none(port):
    done = run("--tiny", "--port", port)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert "is no port: a whole number from 1 to 65535" in done.stderr or "--port" in done.stderr


def test_an_address_that_cannot_be_listened_at():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        number = str(taken.getsockname()[1])
        for host in ("127.0.0.1", "evil.invalid"):
            done = run("--tiny", "--device", "cpu", "--host", host, "--port", number)
            assert done.returncode == 1 and done.stdout == ""
            assert done.stderr.startswith(f"--host {host} --port {number}: this machine cannot listen there (")
            assert len(done.stderr.splitlines()) == 1
