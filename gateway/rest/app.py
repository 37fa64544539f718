"""The REST application: routers behind the boundary, errors in OpenAI's shape. To add routes, put a router into one of
the two lists; those of the first ask for no API key."""

from __future__ import annotations

import time
from collections.abc import Sequence

from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp

from easyspec import __version__
from easyspec.errors import EasyspecError, InvalidRequestError
from easyspec.rpc.errors import mapping_of
from gateway.rest import chat, completions, health, messages, models, playground, responses, tokenize
from gateway.rest.backend import Backend
from gateway.rest.boundary import RestBoundary
from gateway.rest.errors import (
    CLIENT_CLOSED_REQUEST,
    ClientGoneError,
    Failure,
    RefusalError,
    failure_of,
    failure_of_validation,
)
from gateway.rest.gate import Gate
from gateway.rest.recent_items import RecentItems
from gateway.rest.trust import Door, metrics_router

OPEN_ROUTERS: tuple[APIRouter, ...] = (health.router, playground.router)
API_ROUTERS: tuple[APIRouter, ...] = (
    models.router,
    chat.router,
    completions.router,
    messages.router,
    responses.router,
    tokenize.router,
)
# What clients of OpenAI's API may look for.
_NOT_SERVED = (
    ("/v1/embeddings", "embeddings are not served: these models generate text"),
    ("/v1/responses/", "responses are not stored"),
    ("/v1/moderations", "there is no moderation here"),
    ("/v1/images", "these are text models"),
    ("/v1/audio", "these are text models"),
    ("/v1/files", "nothing is stored"),
    ("/v1/batches", "there are no batches: send requests as they come"),
    ("/v1/assistants", "there are no assistants: send all messages to /v1/chat/completions"),
    ("/v1/rerank", "there is no reranking: these models generate text"),
)


def create_app(backend: Backend, gate: Gate) -> ASGIApp:
    """The whole application: OPEN_ROUTERS ask for no key, and all but `boundary.ALWAYS_OPEN` wait behind `gate`."""
    settings = backend.settings
    open_routers = (*OPEN_ROUTERS, metrics_router) if settings.http_metrics else OPEN_ROUTERS
    app = RestBoundary(create_routes(backend, open_routers), gate, Door(backend, open_routers), backend)
    if not settings.cors_origins:
        return app
    origins = [origin.strip() for origin in settings.cors_origins.split(",")]
    # Outermost: a browser asks first, without a key.
    return CORSMiddleware(app, origins, allow_methods=["*"], allow_headers=["*"], expose_headers=["*"])


def create_routes(backend: Backend, open_routers: Sequence[APIRouter] = OPEN_ROUTERS) -> FastAPI:
    """The routes alone, which know their OpenAPI document."""
    app = FastAPI(title="easyspec", version=__version__, docs_url=None, redoc_url=None, redirect_slashes=False)
    app.state.backend = backend
    app.state.started_s = int(time.time())
    app.state.recent_items = RecentItems()
    for router in (*open_routers, *API_ROUTERS):
        app.include_router(router)
    for kind in (EasyspecError, RefusalError, RequestValidationError, HTTPException):
        app.add_exception_handler(kind, _on_error)
    app.add_exception_handler(Exception, _on_error)  # and raised again: the boundary logs it
    return app


async def _on_error(request: Request, error: Exception) -> Response:
    path = request.url.path
    if isinstance(error, ClientGoneError):  # not an error; the boundary sees it as well
        return Response(status_code=CLIENT_CLOSED_REQUEST)
    if isinstance(error, RefusalError):
        return error.failure.response_to(path)
    if isinstance(error, HTTPException):
        return _unrouted(request, error)
    is_malformed = isinstance(error, RequestValidationError)
    reason = mapping_of(InvalidRequestError("", None, "") if is_malformed else error).reason
    request.app.state.backend.metrics.refused(reason)
    if isinstance(error, RequestValidationError):
        return failure_of_validation(error.errors()).response_to(path)
    return failure_of(error).response_to(path)


def _unrouted(request: Request, refusal: HTTPException) -> Response:
    path = request.url.path
    messages = {404: f"there is no {path[:200]} here", 405: f"{request.method} is not allowed here"}
    message = messages.get(refusal.status_code, str(refusal.detail))
    if refusal.status_code == 404:
        message = next((f"{path[:200]}: {why}" for start, why in _NOT_SERVED if path.startswith(start)), message)
        if any(getattr(route, "path", "") == f"/v1{path}" for router in API_ROUTERS for route in router.routes):
            message += f": it is at /v1{path}"
    codes = {404: "not_found", 405: "method_not_allowed"}
    response = Failure(refusal.status_code, message, code=codes.get(refusal.status_code)).response_to(path)
    response.headers.update(refusal.headers or {})
    return response
