"""Request bodies as strict JSON: valid UTF-8, no NaN, no lone surrogates, bounded nesting."""

from __future__ import annotations

import asyncio
import codecs
import gc
import json
import re
from collections.abc import Callable, Coroutine, Mapping
from typing import Any

import pydantic_core
from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from pydantic import BaseModel, ValidationError

from gateway.rest.backend import Backend
from gateway.rest.errors import Failure, RefusalError
from gateway.rest.unknown_fields import note_ignored

IGNORED_HEADER = "x-ignored-fields"
_MAX_HEADER_CHARS = 1000
_NO_TOKEN = re.compile(r"[^A-Za-z0-9_.-]")  # of a field's name that is to stand in a header

# The parser takes 10 ms for the worst of this size; what is larger is parsed and validated beside the event loop.
_LARGE_BYTES = 64 * 1024
# Objects and lists of a body, those in its texts included. A million empty ones take as long as the rest of a request,
# and no other thread gets on meanwhile.
_MOST_CONTAINERS = 400_000


class JsonRequest(Request):
    """A request whose body is parsed by pydantic's parser, which is strict and cannot be made to recurse deeply."""

    _parsed: Any = None

    async def json(self) -> Any:
        return self._parsed if self._parsed is not None else _parsed(await self.body())

    async def read_large(self, model: type[BaseModel]) -> None:
        """Parse and validate the body on another thread if it is large; raises RequestValidationError."""
        body = await self.body()
        if len(body) > _LARGE_BYTES:
            self._parsed = await asyncio.to_thread(_validated, body, model)


def _parsed(body: bytes) -> Any:
    """The JSON value; raises JSONDecodeError. A byte order mark, which some editors write, is no part of it."""
    body = body.removeprefix(codecs.BOM_UTF8)
    if body.count(b"{") + body.count(b"[") > _MOST_CONTAINERS:
        raise json.JSONDecodeError(f"more than {_MOST_CONTAINERS} objects and lists", "", 0)
    # Millions of small lists, of which none is garbage, would be looked through again and again.
    gc.disable()
    try:
        return pydantic_core.from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise json.JSONDecodeError(str(error), "", 0) from None
    finally:
        gc.enable()


def _validated(body: bytes, model: type[BaseModel]) -> BaseModel:
    """The body, as it will be found valid again; raises RequestValidationError."""
    try:
        return model.model_validate(_parsed(body))
    except json.JSONDecodeError as error:
        problem = {"type": "json_invalid", "loc": ("body", 0), "ctx": {"error": error.msg}}
        raise RequestValidationError([problem]) from None
    except ValidationError as error:
        problems = error.errors(include_url=False, include_input=False)
        raise RequestValidationError([one | {"loc": ("body", *one["loc"])} for one in problems]) from None


class JsonRoute(APIRoute):
    """A route that reads its body as a JsonRequest."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()
        model: Any = self.body_field.field_info.annotation if self.body_field is not None else None

        async def handle_json(request: Request) -> Response:
            if request.method == "POST" and (allowed := _unreadable(request.headers)):
                raise RefusalError(Failure(415, allowed, code="invalid_content_type"))
            backend: Backend = request.app.state.backend
            ignored: dict[str, None] | None = {} if backend.settings.unknown_fields == "ignore" else None
            note_ignored(ignored)
            json_request = JsonRequest(request.scope, request.receive)
            if model is not None:
                await json_request.read_large(model)
            response = await handle(json_request)
            if ignored:
                tokens = (_NO_TOKEN.sub("_", name[:100]) for name in ignored)
                response.headers[IGNORED_HEADER] = ", ".join(tokens)[:_MAX_HEADER_CHARS]
                backend.metrics.fields_ignored()
            return response

        return handle_json


def _unreadable(headers: Mapping[str, str]) -> str:
    """What a body's headers must say, if it is not what they say; "" if it may be JSON."""
    kind, _, parameters = headers.get("content-type", "").lower().partition(";")
    kind = kind.strip()
    if not (kind == "application/json" or (kind.startswith("application/") and kind.endswith("+json"))):
        return "content-type must be application/json"
    if "utf-16" in parameters or "utf-32" in parameters:
        return "the charset of JSON must be utf-8"
    if headers.get("content-encoding", "identity").strip().lower() not in ("", "identity"):
        return "content-encoding must be identity: bodies are not unpacked"
    return ""
