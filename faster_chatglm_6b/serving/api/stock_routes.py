"""``POST /`` and ``POST /stream`` in the format of THUDM's api.py, which LangChain's ChatGLM client sends."""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator
from datetime import datetime
from typing import Any

from fastapi import APIRouter, Request, Response

from ...templates.history import History, read_messages
from ..generation import Asked, Generation, Piece
from ..rows.interface import RowRequest
from .protocol import StockRequest
from .service import EVENTS, Service

_MAX_LENGTH = 2048


def stock_routes(service: Service) -> APIRouter:
    """Return the routes of THUDM's interface."""
    router = APIRouter()

    @router.post("/")
    async def whole(body: StockRequest, request: Request) -> Response:
        """Answer a turn."""
        generation, leave = await _generate(service, body, request)
        earlier = _earlier(body)

        def write(pieces: list[Piece]) -> dict[str, Any]:
            return _written(body, earlier, pieces[0].text)

        return await service.whole(request, generation, leave, write)

    @router.post("/stream", response_class=Response, responses={200: EVENTS})
    async def stream(body: StockRequest, request: Request) -> Response:
        """Answer a turn by server-sent events, each with the response so far."""
        generation, leave = await _generate(service, body, request)
        return service.stream(request, generation, leave, _events(body, generation), last=None)

    return router


async def _generate(service: Service, body: StockRequest, request: Request) -> tuple[Generation, Any]:
    leave = service.door.enter(1)
    try:
        prompts = service.prompts
        ids = await prompts.of_turn(body.prompt, body.history)
        row = RowRequest(
            ids=ids,
            max_tokens=prompts.room(ids, body.max_length or _MAX_LENGTH),
            end_ids=prompts.end_ids,
            temperature=prompts.defaults["temperature"] if body.temperature is None else body.temperature,
            top_p=prompts.defaults["top_p"] if body.top_p is None else body.top_p,
            top_k=prompts.defaults["top_k"],
            repetition_penalty=prompts.defaults["repetition_penalty"],
            seed=secrets.randbits(63),
        )
        return service.generate(request, [Asked(row)]), leave
    except BaseException:
        leave()
        raise


async def _events(body: StockRequest, generation: Generation) -> AsyncIterator[dict[str, Any]]:
    response, earlier = "", _earlier(body)
    async for piece in generation.pieces():
        response += piece.text
        if piece.text or piece.end:
            yield {**_written(body, earlier, response), "delta": piece.text, "finished": bool(piece.end)}


def _earlier(body: StockRequest) -> History:
    """Read the history, with nothing of it but texts and roles: what else a client puts there may be no JSON."""
    history = History.of(body.history)
    return History.of(read_messages(history.given) if history.is_messages else history.rounds)


def _written(body: StockRequest, earlier: History, response: str) -> dict[str, Any]:
    return {
        "response": response,
        "history": earlier.with_round(body.prompt, response),
        "status": 200,
        "time": datetime.now().strftime("%Y-%m-%d %H:%M:%S"),
    }
