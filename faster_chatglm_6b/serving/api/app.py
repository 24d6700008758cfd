"""Join a model, its engine and the routes into one ASGI application."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI

from ... import __version__
from ..engine import Engine
from ..rows.interface import Rows
from .errors import DESCRIBED, add_handlers
from .middleware import Middleware
from .openai_routes import openai_routes
from .operator_routes import operator_routes
from .service import Service
from .stock_routes import stock_routes


def build_app(
    model: Any,
    tokenizer: Any,
    rows: Rows,
    names: Sequence[str] = ("chatglm-6b",),
    most_waiting: int = 1024,
    keys: Sequence[str] = (),
    names_requests: bool = True,
) -> FastAPI:
    """Return the application; its engine runs until the application's lifespan ends.

    Args:
        model: a ``ChatGLMForConditionalGeneration``.
        tokenizer: the checkpoint's.
        rows: what computes, over the same model.
        names: by which clients may call the model.
        most_waiting: answers that may wait beyond the rows; others are turned away with 429.
        keys: API keys, one of which a client must send; none lets everybody in.
        names_requests: write X-Request-Id into answers.

    Returns:
        the application, with the ``Service`` as ``app.state.service``.
    """
    engine = Engine(rows)
    service = Service(model, tokenizer, engine, rows.rows, names, most_waiting)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        engine.close()

    app = FastAPI(title="faster_chatglm_6b", version=__version__, lifespan=lifespan, responses=DESCRIBED)
    app.state.service = service
    add_handlers(app)
    for routes in (openai_routes, stock_routes, operator_routes):
        app.include_router(routes(service))
    app.add_middleware(Middleware, keys=keys, names_requests=names_requests)
    return app
