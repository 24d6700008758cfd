"""Run the application under uvicorn: log, signals, and an end that lets answers finish."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import uvicorn
from fastapi import FastAPI

from ..rows.interface import Rows
from ..rows.making import make_rows
from .app import build_app

_log = logging.getLogger("faster_chatglm_6b.serving")
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


@dataclass(frozen=True)
class Settings:
    """How a server runs.

    Attributes:
        names: by which clients may call the model.
        keys: API keys; none lets everybody in.
        rows: most answers that run at once.
        memory: share of the free memory for keys and values.
        most_waiting: answers that may wait beyond the rows.
        shutdown_timeout: seconds that running answers get to finish after SIGTERM.
        log_level: "debug", "info", "warning" or "error".
        speculate: ids that a step drafts for each of a few rows, as of ``generate``: 0, 3, 7 or "auto".
        names_requests: write X-Request-Id into answers; a proxy in front may do that itself.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    names: tuple[str, ...] = ("chatglm-6b",)
    keys: tuple[str, ...] = field(default=(), repr=False)
    rows: int = 256
    memory: float = 0.9
    most_waiting: int = 1024
    shutdown_timeout: int = 30
    log_level: str = "info"
    speculate: int | str = 0
    names_requests: bool = True


def set_up_log(level: str) -> None:
    """Send the log to stderr; ``level`` is that of the settings."""
    logging.basicConfig(
        level=level.upper(), stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )


def application(model: Any, tokenizer: Any, settings: Settings, rows: Rows) -> FastAPI:
    """Return the application over ``rows``."""
    return build_app(
        model, tokenizer, rows, settings.names, settings.most_waiting, settings.keys, settings.names_requests
    )


def serve(model: Any, tokenizer: Any, settings: Settings) -> int:
    """Serve until a signal ends it, and return the exit code: 0, or 1 if the port could not be had.

    Raises:
        ValueError: the memory is too short for one prompt of the model's length.
    """
    set_up_log(settings.log_level)
    rows = make_rows(model, settings.rows, settings.memory, settings.speculate)
    app = application(model, tokenizer, settings, rows)
    config = uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        log_config=None,
        log_level=settings.log_level,
        access_log=False,
        timeout_graceful_shutdown=settings.shutdown_timeout,
    )
    door = app.state.service.door

    def drain() -> None:
        door.is_draining = True
        _log.info("Draining: %d answers may finish within %d s.", door.inside, settings.shutdown_timeout)

    def ready(address: str) -> None:
        tokens = rows.pages * rows.page_tokens
        print(
            f"Serving {settings.names[0]} on http://{address}: {rows.rows} rows, memory for {tokens} tokens.",
            flush=True,
        )

    server = _Server(config, drain, ready)
    try:
        server.run()
    except SystemExit:  # the port; the log says why
        return 1
    return 0 if server.started else 1


class _Server(uvicorn.Server):
    """uvicorn's server, which a second signal ends at once."""

    def __init__(self, config: uvicorn.Config, drain: Callable[[], None], ready: Callable[[str], None]):
        super().__init__(config)
        self._drain, self._ready = drain, ready

    async def startup(self, sockets: Any = None) -> None:
        await super().startup(sockets)
        if self.started and self.servers:
            host, port = self.servers[0].sockets[0].getsockname()[:2]
            self._ready(f"[{host}]:{port}" if ":" in host else f"{host}:{port}")

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Take signals while the server runs; uvicorn's own would raise them again at the end."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._on_signal) for number in _SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _on_signal(self, number: int, frame: Any) -> None:
        if self.should_exit:
            # The model's thread may be in the middle of a step, which nothing interrupts.
            os._exit(128 + number)
        self.should_exit = True
        self._drain()
