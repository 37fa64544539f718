"""What the routes need of the gateway."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Protocol

import structlog
from fastapi import Depends, Request

from easyspec.errors import InvalidRequestError, UnavailableError
from easyspec.speculation.messages import ModelInfo
from gateway.generation import Generator

# As gRPC clients set a deadline: seconds after which the answer is of no use any more.
TIMEOUT_HEADER = "x-request-timeout"


class Backend(Protocol):
    """The gateway behind the REST shim; `generator` is valid once requests are admitted."""

    @property
    def generator(self) -> Generator: ...

    @property
    def request_timeout_s(self) -> float: ...


@dataclass(frozen=True)
class Caller:
    """One HTTP request on its way in: the gateway, who asks, how long it may take, and since when we serve."""

    generator: Generator
    request_id: str
    client: str
    timeout_s: float
    started_s: int

    @property
    def model(self) -> ModelInfo:
        """The model served; UnavailableError while nobody has answered for it."""
        info = self.generator.verifier_peer.info
        if info is None:
            raise UnavailableError("the verifier has not answered yet")
        return info.model


def caller_of(request: Request) -> Caller:
    """A dependency. Whoever authenticates a request leaves the client's name in `request.state.client`."""
    backend: Backend = request.app.state.backend
    peer = request.client.host if request.client is not None else ""
    return Caller(
        generator=backend.generator,
        request_id=str(structlog.contextvars.get_contextvars().get("request_id", "")),
        client=getattr(request.state, "client", peer),
        timeout_s=_timeout_s(request.headers.get(TIMEOUT_HEADER), backend.request_timeout_s),
        started_s=request.app.state.started_s,
    )


def _timeout_s(wanted: str | None, most_s: float) -> float:
    """Seconds that a request may take: what the client wants, and no more than the gateway allows."""
    if wanted is None:
        return most_s
    try:
        timeout_s = float(wanted)
    except ValueError:
        timeout_s = math.nan
    if not timeout_s > 0:
        raise InvalidRequestError(TIMEOUT_HEADER, wanted, "seconds, above 0")
    return min(timeout_s, most_s)


InCaller = Annotated[Caller, Depends(caller_of)]
