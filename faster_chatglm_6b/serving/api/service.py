"""What the routes share: the engine and its door, and the two ways to answer, at once or as a stream of events."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

from fastapi import Request, Response
from fastapi.responses import JSONResponse, StreamingResponse

from ..engine import Engine, EngineClosed
from ..generation import Asked, Generation, Piece
from .errors import ApiError, engine_error
from .metrics import Metrics
from .prompts import Prompts

_log = logging.getLogger("faster_chatglm_6b.serving")
# nginx's status for a client that has gone; only the log sees it.
_CLIENT_GONE = 499
# How /openapi.json describes a stream.
EVENTS: dict[str, Any] = {"content": {"text/event-stream": {}}, "description": "A stream of events."}


class Door:
    """Counts answers from before their prompt is tokenized until they end, and turns away what would wait too long."""

    def __init__(self, rows: int, most_waiting: int):
        self._most = rows + most_waiting
        self.inside = 0
        self.is_draining = False

    def enter(self, answers: int) -> Callable[[], None]:
        """Let answers in, and return what lets them out; it may be called again.

        Raises:
            ApiError: 429 if too many wait, 503 while the server drains.
        """
        if self.is_draining:
            raise ApiError("The server is shutting down.", 503, code="shutting_down", headers={"Retry-After": "5"})
        if self.inside + answers > self._most:
            raise ApiError(
                f"{self.inside} answers run or wait, and at most {self._most} may; try again in a second.",
                429,
                code="queue_full",
                headers={"Retry-After": "1"},
            )
        self.inside += answers
        is_inside = True

        def leave() -> None:
            nonlocal is_inside
            self.inside -= answers if is_inside else 0
            is_inside = False

        return leave


class Service:
    """One model behind HTTP.

    Attributes:
        names: by which clients may call the model; the first is the one in answers.
    """

    def __init__(self, model: Any, tokenizer: Any, engine: Engine, rows: int, names: Sequence[str], most_waiting: int):
        self.tokenizer, self.engine, self.names = tokenizer, engine, [*names]
        self.prompts = Prompts(model, tokenizer)
        self.door = Door(rows, most_waiting)
        self.metrics = Metrics(engine, self.names[0])
        self.created = int(time.time())

    def check_model(self, name: str | None) -> None:
        """Refuse another model's name; none means this one.

        Raises:
            ApiError: 404.
        """
        if name is not None and name not in self.names:
            raise ApiError(
                f"The model {name[:100]!r} is not served here; there is {', '.join(self.names)}.",
                404,
                param="model",
                code="model_not_found",
            )

    def generate(self, request: Request, asked: Sequence[Asked]) -> Generation:
        """Submit answers.

        Raises:
            ApiError: 400 if the server's memory could never hold one, 503 if the engine has stopped.
        """
        try:
            for one in asked:
                self.engine.check(one.row)
            arrived = request.scope["serving"]["arrived"]
            metrics = self.metrics
            return Generation(self.engine, self.tokenizer, asked, metrics.on_tokens, metrics.on_end, arrived)
        except EngineClosed as error:
            raise ApiError(str(error), 503, code="shutting_down") from error
        except ValueError as error:
            raise ApiError(str(error), code="context_length_exceeded") from error

    async def whole(
        self,
        request: Request,
        generation: Generation,
        leave: Callable[[], None],
        write: Callable[[list[Piece]], dict[str, Any]],
    ) -> Response:
        """Answer at once, in JSON; a client that has gone ends the answers.

        Raises:
            ApiError: 500 if the engine failed, 503 if it stopped.
        """
        work = asyncio.ensure_future(generation.whole())
        gone = asyncio.ensure_future(_until_gone(request))
        try:
            await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                return Response(status_code=_CLIENT_GONE)
            return JSONResponse(write(work.result()))
        except EngineClosed as error:
            raise ApiError(str(error), 503, code="shutting_down") from error
        except Exception as error:
            raise engine_error(error) from error
        finally:
            work.cancel()
            gone.cancel()
            self._closed(request, generation, leave)

    def stream(
        self,
        request: Request,
        generation: Generation,
        leave: Callable[[], None],
        events: AsyncIterator[dict[str, Any]],
        last: str | None = "[DONE]",
    ) -> Response:
        """Answer by server-sent events; a client that has gone ends the answers."""

        async def lines() -> AsyncIterator[str]:
            try:
                async for event in events:
                    yield _event(json.dumps(event, ensure_ascii=False))
            except Exception as error:
                is_closed = isinstance(error, EngineClosed)
                failure = ApiError(str(error), 503, code="shutting_down") if is_closed else engine_error(error)
                yield _event(json.dumps(failure.body(), ensure_ascii=False))
            if last is not None:
                yield _event(last)

        return _EventStream(lines(), lambda: self._closed(request, generation, leave))

    @staticmethod
    def _closed(request: Request, generation: Generation, leave: Callable[[], None]) -> None:
        generation.cancel()
        leave()
        prompts = {id(answer.asked.row.ids): len(answer.asked.row.ids) for answer in generation.answers}
        request.scope["serving"] |= {
            "prompt_tokens": sum(prompts.values()),
            "completion_tokens": sum(answer.tokens for answer in generation.answers),
            "finish": ",".join(answer.end for answer in generation.answers),
        }


class _EventStream(StreamingResponse):
    """Events, and what to do when they end, however that comes: a client may go while an event is on its way."""

    media_type = "text/event-stream"

    def __init__(self, lines: AsyncIterator[str], on_close: Callable[[], None]):
        super().__init__(lines, headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        self._on_close = on_close

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._on_close()


def _event(data: str) -> str:
    return f"data: {data}\n\n"


async def _until_gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
