"""The REST application: routers behind the boundary, errors in OpenAI's shape.

To add routes, put a router into one of the two lists; what must happen before every API request (authentication, say)
is a dependency that `create_app` gets.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, cast

import structlog
from fastapi import APIRouter, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import ASGIApp

from easyspec import __version__
from easyspec.errors import EasyspecError
from gateway.rest import chat, completions, health, models, playground, tokenize
from gateway.rest.backend import Backend
from gateway.rest.boundary import RestBoundary
from gateway.rest.errors import Failure, RefusalError, failure_of, failure_of_validation
from gateway.rest.gate import Gate

OPEN_ROUTERS: tuple[APIRouter, ...] = (health.router, playground.router)
API_ROUTERS: tuple[APIRouter, ...] = (models.router, chat.router, completions.router, tokenize.router)

# As much as the gRPC side takes.
MAX_BODY_BYTES = 16 * 1024 * 1024


def create_app(
    backend: Backend,
    gate: Gate,
    api_dependencies: Sequence[Any] = (),
    open_routers: Sequence[APIRouter] = OPEN_ROUTERS,
    max_body_bytes: int = MAX_BODY_BYTES,
) -> ASGIApp:
    """The whole application as one ASGI callable.

    `api_dependencies` (made with fastapi.Depends) run before every route of API_ROUTERS; `open_routers` ask for
    nothing. Requests wait behind `gate`, but for those in `boundary.ALWAYS_OPEN`.
    """
    return RestBoundary(create_routes(backend, api_dependencies, open_routers), gate, max_body_bytes)


def create_routes(
    backend: Backend, api_dependencies: Sequence[Any] = (), open_routers: Sequence[APIRouter] = OPEN_ROUTERS
) -> FastAPI:
    """The routes alone, which know their OpenAPI document."""
    app = FastAPI(title="easyspec", version=__version__, docs_url=None, redoc_url=None, redirect_slashes=False)
    app.state.backend = backend
    app.state.started_s = int(time.time())
    for router in open_routers:
        app.include_router(router)
    for router in API_ROUTERS:
        app.include_router(router, dependencies=list(api_dependencies))
    app.add_exception_handler(EasyspecError, _on_error)
    app.add_exception_handler(RefusalError, _on_refusal)
    app.add_exception_handler(RequestValidationError, _on_invalid)
    app.add_exception_handler(HTTPException, _on_http_error)
    return app


async def _on_error(_request: Request, error: Exception) -> Response:
    return failure_of(error, str(structlog.contextvars.get_contextvars().get("request_id", ""))).response


async def _on_refusal(_request: Request, error: Exception) -> Response:
    return cast(RefusalError, error).failure.response


async def _on_invalid(_request: Request, error: Exception) -> Response:
    return failure_of_validation(cast(RequestValidationError, error).errors()).response


async def _on_http_error(request: Request, error: Exception) -> Response:
    refusal = cast(HTTPException, error)
    messages = {404: f"there is no {request.url.path[:200]} here", 405: f"{request.method} is not allowed here"}
    message = messages.get(refusal.status_code, str(refusal.detail))
    codes = {404: "not_found", 405: "method_not_allowed"}
    response = Failure(refusal.status_code, message, code=codes.get(refusal.status_code)).response
    response.headers.update(refusal.headers or {})
    return response
