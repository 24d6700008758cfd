"""Let only the requests of the web demo's own page in, and only up to a bounded size."""

from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

# This page needs nothing else that Gradio takes by POST, uploads above all.
ROUTES = ("/gradio_api/queue/join", "/gradio_api/cancel", "/gradio_api/reset", "/login")
# The longest message in JSON, where a character may take twelve bytes, and room for the rest of the request.
LARGEST_BODY = 512 * 1024


class Guard:
    """ASGI middleware that reads a body up to the limit before anything else sees it."""

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        elif scope["type"] != "http" or scope["method"] in ("GET", "HEAD", "OPTIONS"):
            await self.app(scope, receive, send)
        elif scope["path"].rstrip("/") not in ROUTES:
            await PlainTextResponse("This server takes nothing here.", 404)(scope, receive, send)
        elif (body := await _body(receive)) is None:
            await PlainTextResponse(f"A request has at most {LARGEST_BODY} bytes.", 413)(scope, receive, send)
        else:
            await self.app(scope, _replayed(body, receive), send)


async def _body(receive: Receive) -> bytes | None:
    """Read the whole body; return None as soon as it is too large."""
    pieces, size, more = [], 0, True
    while more:
        message = await receive()
        pieces.append(message.get("body", b""))
        size += len(pieces[-1])
        if size > LARGEST_BODY:
            return None
        more = message.get("more_body", False)  # a client that has gone sends no such key
    return b"".join(pieces)


def _replayed(body: bytes, receive: Receive) -> Receive:
    waiting = [body]

    async def replay() -> Message:
        if waiting:
            return {"type": "http.request", "body": waiting.pop(), "more_body": False}
        return await receive()

    return replay
