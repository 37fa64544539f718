"""Who may use the REST API."""

from __future__ import annotations

import re
from collections.abc import Sequence

from fastapi import APIRouter, Request, Response
from starlette.datastructures import Headers
from starlette.routing import Match
from starlette.types import Scope

from easyspec.telemetry.metrics import CONTENT_TYPE
from gateway.rest.backend import Backend
from gateway.rest.errors import Failure, RefusalError

_PORT = re.compile(r":[0-9]+$")

metrics_router = APIRouter()


class Door:
    """Asks for a key before anything of a request is read, but for the routes of `open_routers`. What is not open is
    closed: a route that is added later is behind the door. With `trusted_hosts`, nothing is open to a page in a browser
    here whose name was led to this address: it calls this machine by another name."""

    def __init__(self, backend: Backend, open_routers: Sequence[APIRouter]) -> None:
        self._hosts = backend.settings.trusted_hosts
        self._authenticate = backend.authenticate
        self._open_routes = [route for router in open_routers for route in router.routes]

    def enter(self, scope: Scope) -> str | None:
        """The client's name, if it has one; raises UnauthenticatedError, and RefusalError for a foreign name."""
        self._check_host(scope)
        if any(route.matches(scope)[0] is not Match.NONE for route in self._open_routes):
            return None
        headers = Headers(scope=scope)
        header = headers.get("authorization")
        if header is None and (key := headers.get("x-api-key")) is not None:  # as Anthropic's clients have it
            header = f"Bearer {key}"
        return self._authenticate(header)

    def _check_host(self, scope: Scope) -> None:
        if self._hosts is None:
            return
        for host in map(str.lower, Headers(scope=scope).getlist("host")):
            name = host.rpartition(":")[0] if _PORT.search(host) else host
            if name not in self._hosts and not name.endswith(".localhost"):
                message = f"{host[:200]} is not a name of this gateway; --http-hosts adds names"
                raise RefusalError(Failure(403, message, code="foreign_host"))


@metrics_router.get("/metrics", include_in_schema=False)
async def metrics(request: Request) -> Response:
    """Counts and times, so it asks for no key."""
    return Response(request.app.state.backend.metrics.render(), headers={"content-type": CONTENT_TYPE})
