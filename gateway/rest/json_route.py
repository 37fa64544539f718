"""Request bodies as strict JSON: valid UTF-8, no NaN, no lone surrogates, bounded nesting."""

from __future__ import annotations

import json
from collections.abc import Callable, Coroutine
from typing import Any

import pydantic_core
from fastapi import Request
from fastapi.routing import APIRoute
from starlette.responses import Response

from gateway.rest.errors import Failure, RefusalError


class JsonRequest(Request):
    """A request whose body is parsed by pydantic's parser, which is strict and cannot be made to recurse deeply."""

    async def json(self) -> Any:
        try:
            return pydantic_core.from_json(await self.body(), allow_inf_nan=False)
        except ValueError as error:
            raise json.JSONDecodeError(str(error), "", 0) from None


class JsonRoute(APIRoute):
    """A route that reads its body as a JsonRequest."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def handle_json(request: Request) -> Response:
            if request.method == "POST" and not _is_json(request.headers.get("content-type", "")):
                raise RefusalError(Failure(415, "content-type must be application/json", code="invalid_content_type"))
            return await handle(JsonRequest(request.scope, request.receive))

        return handle_json


def _is_json(content_type: str) -> bool:
    kind = content_type.partition(";")[0].strip().lower()
    return kind == "application/json" or (kind.startswith("application/") and kind.endswith("+json"))
