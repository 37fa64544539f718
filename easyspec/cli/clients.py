"""The command's side of the wire, and how it gets into a gateway that asks for a key, or speaks TLS."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Self

import grpc
import typer
from grpc_health.v1 import health_pb2, health_pb2_grpc
from pydantic import SecretStr
from pydantic_settings import BaseSettings, SettingsConfigDict

from easyspec.errors import ConnectionLostError, EasyspecError, UnavailableError
from easyspec.rpc import convert
from easyspec.rpc.channels import open_channel
from easyspec.rpc.errors import error_from_rpc
from easyspec.speculation.parameters import LayerPlanRequest, StopConditions, TreeBudget
from easyspec.speculation.sources import DraftSources
from easyspec.tls import ChannelTls
from easyspec.v1 import generation_pb2, generation_pb2_grpc, types_pb2, verifier_pb2, verifier_pb2_grpc

GenerateResponse = generation_pb2.GenerateResponse
Completion = generation_pb2.Completion

_PROBE_TIMEOUT_S = 2.0
_Mode = generation_pb2.SpeculationParameters


@dataclass(frozen=True)
class GatewayAccess:
    """What a gateway is shown, and what it is known by; by default nothing, in plaintext."""

    api_key: str | None = field(default=None, repr=False)
    tls: ChannelTls | None = None

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        return (("authorization", f"Bearer {self.api_key}"),) if self.api_key else ()


ANONYMOUS = GatewayAccess()


class _Variables(BaseSettings):
    """EASYSPEC_API_KEY, EASYSPEC_TLS_CA (turns TLS on), EASYSPEC_TLS_CERTIFICATE, ..._KEY, ..._SERVER_NAME."""

    model_config = SettingsConfigDict(env_prefix="EASYSPEC_", frozen=True)

    api_key: SecretStr | None = None
    tls_ca: Path | None = None
    tls_certificate: Path | None = None
    tls_key: Path | None = None
    tls_server_name: str | None = None


def access_from_environment(is_own_gateway: bool) -> GatewayAccess:
    """As the variables say; a gateway that the command has started itself speaks plaintext on this machine."""
    variables = _Variables()
    tls = None
    if variables.tls_ca is not None and not is_own_gateway:
        tls = ChannelTls(variables.tls_ca, variables.tls_certificate, variables.tls_key, variables.tls_server_name)
    return GatewayAccess(variables.api_key.get_secret_value() if variables.api_key else None, tls)


@dataclass(frozen=True)
class SamplingFlags:
    """Sampling as given on the command line; None takes the service's default."""

    seed: Annotated[int | None, typer.Option(help="Reproduces a completion. Unset: drawn, and reported.")] = None
    temperature: Annotated[float | None, typer.Option(help="0 is greedy. [default: 1.0]")] = None
    top_k: Annotated[int | None, typer.Option(help="Keep the k likeliest tokens. [default: all]")] = None
    top_p: Annotated[float | None, typer.Option(help="Keep this much probability. [default: 1.0]")] = None
    min_p: Annotated[float | None, typer.Option(help="Drop tokens below this share of the likeliest.")] = None
    repetition_penalty: Annotated[float | None, typer.Option(help="Above 1 discourages seen tokens.")] = None
    presence_penalty: Annotated[float | None, typer.Option(help="Per token seen in the output, once.")] = None
    frequency_penalty: Annotated[float | None, typer.Option(help="Per token seen in the output, each time.")] = None


@dataclass(frozen=True)
class Turn:
    """One message of a conversation; `role` is system, user or assistant."""

    role: str
    content: str


@dataclass(frozen=True)
class GenerateFlags:
    """A request as given on the command line; with `is_chat` the prompt is a user's message after `earlier_turns`.

    `model` empty is the gateway's first one.
    """

    prompt: str
    model: str = field(default="", kw_only=True)
    sampling: SamplingFlags = field(default_factory=SamplingFlags)
    stop: StopConditions = field(default_factory=StopConditions)
    stop_strings: tuple[str, ...] = ()
    is_chat: bool = False
    earlier_turns: tuple[Turn, ...] = ()
    is_drafting: bool = True
    num_draft_levels: int | None = None
    tree_width: int | None = None
    num_nodes: int | None = None
    sources: DraftSources | None = None
    layer_plan: LayerPlanRequest = field(default_factory=LayerPlanRequest)


class GatewayClient:
    """Talks to the gateway at `address`; every failure is an EasyspecError."""

    def __init__(self, address: str, access: GatewayAccess = ANONYMOUS) -> None:
        self._address = address
        self._access = access

    async def __aenter__(self) -> Self:
        self._channel = open_channel(self._address, tls=self._access.tls)
        self._stub: generation_pb2_grpc.GenerationServiceAsyncStub = generation_pb2_grpc.GenerationServiceStub(
            self._channel
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._channel.close()

    async def info(self) -> generation_pb2.GetServerInfoResponse:
        try:
            return await self._stub.GetServerInfo(
                generation_pb2.GetServerInfoRequest(), timeout=_PROBE_TIMEOUT_S, metadata=self._access.metadata
            )
        except grpc.aio.AioRpcError as error:
            raise self._named(error_from_rpc(error)) from error

    async def generate(self, flags: GenerateFlags) -> AsyncGenerator[GenerateResponse, None]:
        request = request_of(flags, convert.budget_from_pb((await self.info()).default_budget))
        call = self._stub.Generate(request, metadata=self._access.metadata)
        try:
            async for response in call:
                yield response
        except grpc.aio.AioRpcError as error:
            raise self._named(error_from_rpc(error)) from error
        finally:
            call.cancel()

    def _named(self, error: EasyspecError) -> EasyspecError:
        return (
            UnavailableError(f"gateway {self._address}: {error}")
            if type(error) in (UnavailableError, ConnectionLostError)
            else error
        )


def request_of(flags: GenerateFlags, default_budget: TreeBudget) -> generation_pb2.GenerateRequest:
    """The request; `default_budget` completes a tree size that was given in part."""
    sizes = {"num_levels": flags.num_draft_levels, "width": flags.tree_width, "num_nodes": flags.num_nodes}
    named = {name: size for name, size in sizes.items() if size is not None}
    mode = _Mode.MODE_OFF
    if flags.is_drafting:  # a named tree is used; else the gateway chooses by what drafts earn
        mode = _Mode.MODE_ON if named else _Mode.MODE_AUTO
    request = generation_pb2.GenerateRequest(
        model=flags.model,
        sampling=types_pb2.SamplingParameters(**vars(flags.sampling)),
        stop=convert.stop_to_pb(flags.stop),
        stop_strings=flags.stop_strings,
        speculation=generation_pb2.SpeculationParameters(
            mode=mode,
            budget=convert.budget_to_pb(replace(default_budget, **named)),
            layer_plan=convert.layer_plan_to_pb(flags.layer_plan),
            sources=convert.sources_to_pb(flags.sources),
        ),
    )
    if flags.is_chat:
        for turn in (*flags.earlier_turns, Turn("user", flags.prompt)):
            request.chat.messages.add(role=turn.role, content=turn.content)
    else:
        request.text = flags.prompt
    return request


def finish_reason_name(completion: Completion) -> str:
    """The finish reason in a word, and what matched."""
    if completion.finish_reason == types_pb2.FINISH_REASON_LENGTH:
        return "length"
    if completion.HasField("stop_string"):
        return f"stop string {completion.stop_string!r}"
    return f"stop token {completion.token_id}"


async def verifier_info(address: str) -> verifier_pb2.GetVerifierInfoResponse:
    """What a verifier of this machine says of itself; raises EasyspecError."""
    async with open_channel(address) as channel:
        stub: verifier_pb2_grpc.VerifierServiceAsyncStub = verifier_pb2_grpc.VerifierServiceStub(channel)
        try:
            return await stub.GetVerifierInfo(verifier_pb2.GetVerifierInfoRequest(), timeout=_PROBE_TIMEOUT_S)
        except grpc.aio.AioRpcError as error:
            raise error_from_rpc(error) from error


async def is_serving(address: str) -> bool:
    async with open_channel(address) as channel:
        try:
            response = await health_pb2_grpc.HealthStub(channel).Check(
                health_pb2.HealthCheckRequest(), timeout=_PROBE_TIMEOUT_S
            )
        except grpc.aio.AioRpcError:
            return False
    return bool(response.status == health_pb2.HealthCheckResponse.SERVING)


async def are_peers_ready(gateway_address: str, has_drafter: bool = True) -> bool:
    """Whether the gateway has found the verifiers of all its models, and its drafter where it `has_drafter`; one that
    asks for a key counts as ready."""
    async with open_channel(gateway_address) as channel:
        stub: generation_pb2_grpc.GenerationServiceAsyncStub = generation_pb2_grpc.GenerationServiceStub(channel)
        try:
            info = await stub.GetServerInfo(generation_pb2.GetServerInfoRequest(), timeout=_PROBE_TIMEOUT_S)
        except grpc.aio.AioRpcError as error:
            return error.code() is grpc.StatusCode.UNAUTHENTICATED
    states = [model.verifier_state for model in info.served_models]
    if has_drafter:
        states.append(info.drafter_state)
    return all(state == generation_pb2.GetServerInfoResponse.PEER_STATE_READY for state in states)
