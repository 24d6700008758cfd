"""What happens to every request: an id, the key, a limit of its size, a line in the log."""

from __future__ import annotations

import json
import logging
import re
import secrets
import time
import uuid
from collections.abc import Sequence
from typing import Any

from .errors import ApiError

access_log = logging.getLogger("faster_chatglm_6b.serving.access")

MOST_BYTES = 16 << 20
_OPEN_TO_ALL = {"/health", "/version", "/metrics"}
_REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}")


class Middleware:
    """Plain ASGI: a response passes through as it comes, and a client's leaving reaches the routes."""

    def __init__(self, app: Any, keys: Sequence[str] = (), names_requests: bool = True):
        self._app, self._keys, self._names_requests = app, [key.encode() for key in keys], names_requests

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        """Handle one connection of any type."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        given = headers.get("x-request-id", "")
        request_id = given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        record: dict[str, Any] = {"arrived": time.monotonic()}
        scope["serving"] = record
        status = 0

        async def send_with_id(message: dict[str, Any]) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            if message["type"] == "http.response.start" and self._names_requests:
                message = {**message, "headers": [*message["headers"], (b"x-request-id", request_id.encode())]}
            await send(message)

        try:
            # Below a prefix, the path has it and the root path says so.
            refusal = self._refusal(scope["path"].removeprefix(scope.get("root_path", "")), headers)
            if refusal is not None:
                await refusal.response()(scope, receive, send_with_id)
            else:
                await self._app(scope, _limited(receive), send_with_id)
        except ApiError as error:
            await error.response()(scope, receive, send_with_id)
        finally:
            _log_access(scope, record, status, request_id)

    def _refusal(self, path: str, headers: dict[str, str]) -> ApiError | None:
        length = headers.get("content-length", "")
        if length.isascii() and length.isdigit() and int(length[:20]) > MOST_BYTES:
            return _too_large()
        if not self._keys or path in _OPEN_TO_ALL:
            return None
        kind, _, key = headers.get("authorization", "").partition(" ")
        is_right = [secrets.compare_digest(key.strip().encode("latin-1"), one) for one in self._keys]
        if kind.lower() == "bearer" and any(is_right):
            return None
        return ApiError(
            "The API key is missing or wrong; send it as 'Authorization: Bearer KEY'.",
            401,
            code="invalid_api_key",
            headers={"WWW-Authenticate": "Bearer"},
        )


def _limited(receive: Any) -> Any:
    """Return ``receive`` for a body that must not grow beyond the limit, whatever its headers say."""
    size = 0

    async def limited() -> dict[str, Any]:
        nonlocal size
        message = await receive()
        size += len(message.get("body", b""))
        if size > MOST_BYTES:
            raise _too_large()
        return message

    return limited


def _too_large() -> ApiError:
    return ApiError(f"The body is larger than {MOST_BYTES >> 20} MiB; send a shorter prompt.", 413, code="too_large")


def _log_access(scope: dict[str, Any], record: dict[str, Any], status: int, request_id: str) -> None:
    seconds = time.monotonic() - record.pop("arrived")
    line = {
        "request_id": request_id,
        "client": (scope.get("client") or ("",))[0],
        "method": scope["method"],
        "path": scope["path"][:200],
        "status": status,
        "ms": round(seconds * 1000, 1),
        **record,
    }
    access_log.info("%s", json.dumps(line, ensure_ascii=True))
