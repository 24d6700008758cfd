"""/health, /version and /metrics."""

from __future__ import annotations

from fastapi import APIRouter, Response
from prometheus_client import CONTENT_TYPE_LATEST

from ... import __version__
from .errors import ApiError
from .service import Service


def operator_routes(service: Service) -> APIRouter:
    """Return the routes that operators and load balancers look at; they need no key."""
    router = APIRouter()

    @router.get("/health", response_class=Response)
    async def health() -> Response:
        """Return 200 if requests are taken, 503 if not."""
        if service.door.is_draining or not service.engine.is_alive:
            raise ApiError("The server takes no requests: it is shutting down, or its engine has failed.", 503)
        return Response()

    @router.get("/version")
    async def version() -> dict[str, str]:
        """Return this package's version."""
        return {"version": __version__}

    @router.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
    async def metrics() -> Response:
        """Return the numbers in Prometheus' text format."""
        return Response(service.metrics.text(), media_type=CONTENT_TYPE_LATEST)

    return router
