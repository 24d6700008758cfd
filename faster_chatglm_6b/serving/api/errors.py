"""Errors in OpenAI's form, ``{"error": {"message", "type", "param", "code"}}``."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException

_TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


class ErrorFields(BaseModel):
    """What an error says."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """The body of every answer that is an error."""

    error: ErrorFields


# For the description in /openapi.json, which would otherwise have FastAPI's own form.
DESCRIBED: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": ErrorBody, "description": "The request cannot be served; the message says why."},
    "5XX": {"model": ErrorBody, "description": "The server cannot serve it, or has failed."},
}


class ApiError(Exception):
    """An answer other than 200: one sentence, the status, the field at fault and a word for programs."""

    def __init__(
        self,
        message: str,
        status: int = 400,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ):
        super().__init__(message)
        self.message, self.param = _printable(message), None if param is None else _printable(param)
        self.status, self.code, self.headers = status, code, headers

    def body(self) -> dict[str, Any]:
        """Return OpenAI's JSON."""
        kind = _TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        """Return the whole answer."""
        return JSONResponse(self.body(), self.status, self.headers)


def _printable(text: str) -> str:
    """Replace halves of surrogate pairs, which JSON can spell and UTF-8 cannot."""
    return text.encode("utf-8", "replace").decode()


def unsupported(name: str, reason: str) -> ApiError:
    """Return the error for a field that would change the answer and cannot be honoured."""
    return ApiError(f"{name} is not supported: {reason}", param=name, code="unsupported")


def engine_error(error: Exception) -> ApiError:
    """Return the error for a request that has failed in the engine; the log has its traceback."""
    return ApiError(
        f"The model could not answer this request: {type(error).__name__}: {error}", 500, code="engine_error"
    )


def add_handlers(app: FastAPI) -> None:
    """Let every error of the application take OpenAI's form."""
    app.add_exception_handler(ApiError, _api_error)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http)
    app.add_exception_handler(Exception, _failed)


async def _api_error(request: Request, error: ApiError) -> JSONResponse:
    return error.response()


async def _invalid(request: Request, error: RequestValidationError) -> JSONResponse:
    first = error.errors()[0]
    place = [str(part) for part in first["loc"] if part != "body"]
    if first["type"] == "json_invalid":
        reason = first.get("ctx", {}).get("error", "")
        return ApiError(f"The body is not valid JSON: {reason}.", code="json_invalid").response()
    if not place and "json" not in request.headers.get("content-type", ""):
        return ApiError(
            "The body is no JSON object; send it with the header Content-Type: application/json."
        ).response()
    param = ".".join(place) or None
    message = first["msg"].removeprefix("Value error, ")
    return ApiError(f"{param or 'The body'}: {message}", param=param, code="invalid_value").response()


async def _http(request: Request, error: HTTPException) -> JSONResponse:
    if isinstance(error.__cause__, ApiError):  # raised while the body was read
        return error.__cause__.response()
    message = str(error.detail)
    if error.status_code in (404, 405):
        message = f"{request.method} {request.url.path} is not served here; docs/serving.md lists what is."
    return ApiError(message, error.status_code, headers=dict(error.headers or {})).response()


async def _failed(request: Request, error: Exception) -> JSONResponse:
    return ApiError("The server has failed on this request; its log says where.", 500, code="internal").response()
