"""What the routes need of the gateway."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Annotated, Literal, Protocol

from fastapi import Depends, Request

from easyspec.errors import InvalidRequestError, UnavailableError
from easyspec.speculation.messages import ModelInfo
from easyspec.tls import ServerTls
from gateway.generation.generator import Generator
from gateway.generation.served_models import ServedModels
from gateway.rest.errors import request_id
from gateway.telemetry.metrics import GatewayMetrics
from gateway.text.conversation import Conversation

# As gRPC clients set a deadline: seconds after which the answer is of no use any more.
TIMEOUT_HEADER = "x-request-timeout"
_NUM_CONTEXTS = 16


class RestSettings(Protocol):
    """What the gateway's settings say of REST."""

    http_address: str
    http_metrics: bool
    cors_origins: str | None
    unknown_fields: Literal["ignore", "refuse"]
    max_request_bytes: int
    request_timeout_s: float

    @property
    def trusted_hosts(self) -> frozenset[str] | None: ...

    @property
    def server_tls(self) -> ServerTls | None: ...


class Backend(Protocol):
    """The gateway behind the REST shim; `models` is valid once requests are admitted."""

    metrics: GatewayMetrics

    @property
    def settings(self) -> RestSettings: ...

    @property
    def models(self) -> ServedModels: ...

    def authenticate(self, authorization: str | None) -> str | None:
        """A client's name by an Authorization header, None where no key is needed; raises UnauthenticatedError."""


@dataclass(frozen=True)
class Caller:
    """One HTTP request on its way in. `generator` is the model that is asked: the first one, until `for_model` says
    otherwise; `started_s` is since when we serve."""

    models: ServedModels
    generator: Generator
    request_id: str
    client: str
    timeout_s: float
    started_s: int

    @property
    def model(self) -> ModelInfo:
        """The model that is asked; UnavailableError while no verifier has answered for it."""
        info = self.generator.model_info
        if info is None:
            raise UnavailableError("the verifier has not answered yet")
        return info

    async def encoded(self, prompt: str | Conversation) -> tuple[int, ...]:
        """Token ids, also of texts that do not fit the context: how much to cut is a good question."""
        self.generator.check_size(prompt)
        return await self.generator.encode(prompt, _NUM_CONTEXTS * self.model.max_model_len)

    def for_model(self, name: str | None) -> Caller:
        """The same, with the model that the request names; raises UnknownModelError."""
        return replace(self, generator=self.models.of(name or ""))


def caller_of(request: Request) -> Caller:
    """A dependency. Authentication leaves the client's name in `request.state.client`."""
    backend: Backend = request.app.state.backend
    peer = request.client.host if request.client is not None else ""
    timeout_s = backend.settings.request_timeout_s
    if (wanted := request.headers.get(TIMEOUT_HEADER)) is not None:
        try:
            timeout_s = min(float(wanted), timeout_s)
        except ValueError:
            timeout_s = math.nan
        if not timeout_s > 0:
            raise InvalidRequestError(TIMEOUT_HEADER, wanted, "seconds, above 0")
    return Caller(
        models=backend.models,
        generator=backend.models.first,
        request_id=request_id(),
        client=getattr(request.state, "client", peer),
        timeout_s=timeout_s,
        started_s=request.app.state.started_s,
    )


InCaller = Annotated[Caller, Depends(caller_of)]
