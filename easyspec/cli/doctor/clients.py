"""Checks of running services: which role answers, how soon, and whether they fit together."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from typing import TypeAlias

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from easyspec import __version__
from easyspec.cli.clients import ANONYMOUS, GatewayAccess
from easyspec.cli.doctor.report import Finding, ok, problem, warning
from easyspec.rpc.channels import open_channel
from easyspec.v1 import (
    drafter_pb2,
    drafter_pb2_grpc,
    generation_pb2,
    generation_pb2_grpc,
    types_pb2,
    verifier_pb2,
    verifier_pb2_grpc,
)

ROLES = ("gateway", "drafter", "verifier")
# A round is a few of these; between machines of one rack 0.1 to 0.5 ms is usual.
SLOW_ROUND_TRIP_MS = 5.0

_TIMEOUT_S = 2.0
_NUM_ROUND_TRIPS = 7
_SERVICES = {
    "gateway": generation_pb2.DESCRIPTOR.services_by_name["GenerationService"].full_name,
    "drafter": drafter_pb2.DESCRIPTOR.services_by_name["DrafterService"].full_name,
    "verifier": verifier_pb2.DESCRIPTOR.services_by_name["VerifierService"].full_name,
}
_PeerState = generation_pb2.GetServerInfoResponse
# Model, version, and what else there is to say.
_Answer: TypeAlias = tuple[types_pb2.ModelInfo | None, str, list[Finding]]


@dataclass(frozen=True)
class PeerReport:
    """What was found at one address; `model` is the base's at a gateway, None without an answer."""

    findings: list[Finding]
    model: types_pb2.ModelInfo | None = None


async def role_at(address: str) -> str | None:
    """The role of the easyspec service at `address`; None if there is none."""
    async with open_channel(address) as channel:
        for role in ROLES:
            try:
                await _health(channel, role)
                return role
            except grpc.aio.AioRpcError as error:
                if error.code() is not grpc.StatusCode.NOT_FOUND:
                    return None
    return None


async def check_peer(role: str, address: str, access: GatewayAccess = ANONYMOUS) -> PeerReport:
    """Health, model, version and round trip of the service that should be at `address`.

    `access` is the gateway's: the key it asks for, and its TLS.
    """
    if role != "gateway":
        access = ANONYMOUS
    async with open_channel(address, tls=access.tls) as channel:
        try:
            is_serving = await _health(channel, role)
        except grpc.aio.AioRpcError as error:
            return PeerReport([await _explain_absence(role, address, error)])
        if not is_serving:
            advice = "wait until it has loaded; its log says what it is doing"
            return PeerReport([warning(role, f"{address} answers: not serving yet, or draining", advice)])
        try:
            model, version, findings = await _ASK[role](channel, access)
            about = await _about(role, address, channel, model or types_pb2.ModelInfo(name="no model"), version)
            return PeerReport([*about, *findings], model)
        except grpc.aio.AioRpcError as error:
            advice = f"see the log of the {role}"
            if error.code() is grpc.StatusCode.UNAUTHENTICATED:
                advice = "set EASYSPEC_API_KEY to a key that it knows"
            return PeerReport([problem(role, f"{address}: {error.code().name}: {error.details()}", advice)])


async def _explain_absence(role: str, address: str, error: grpc.aio.AioRpcError) -> Finding:
    if error.code() is grpc.StatusCode.NOT_FOUND:
        other = await role_at(address)
        if other is not None:
            return problem(role, f"{address} is a {other}", f"name the address of the {role}")
    if error.code() is grpc.StatusCode.UNIMPLEMENTED:
        return problem(role, f"{address} speaks gRPC, but not as easyspec does", f"name the address of the {role}")
    return problem(role, f"no answer from {address}", f"start the {role} there, or name where it runs")


async def _health(channel: grpc.aio.Channel, role: str) -> bool:
    request = health_pb2.HealthCheckRequest(service=_SERVICES[role])
    response = await health_pb2_grpc.HealthStub(channel).Check(request, timeout=_TIMEOUT_S)
    return bool(response.status == health_pb2.HealthCheckResponse.SERVING)


async def _ask_verifier(channel: grpc.aio.Channel, _access: GatewayAccess) -> _Answer:
    stub: verifier_pb2_grpc.VerifierServiceAsyncStub = verifier_pb2_grpc.VerifierServiceStub(channel)
    info = await stub.GetVerifierInfo(verifier_pb2.GetVerifierInfoRequest(), timeout=_TIMEOUT_S)
    advice = "speculation may change a token now and then; float32 on this device may be exact"
    varying = warning("verifier", "its passes are not bit-identical for different batches", advice)
    return info.model, info.version, [] if info.row_invariant else [varying]


async def _ask_drafter(channel: grpc.aio.Channel, _access: GatewayAccess) -> _Answer:
    stub: drafter_pb2_grpc.DrafterServiceAsyncStub = drafter_pb2_grpc.DrafterServiceStub(channel)
    info = await stub.GetDrafterInfo(drafter_pb2.GetDrafterInfoRequest(), timeout=_TIMEOUT_S)
    return info.model, info.version, []


async def _ask_gateway(channel: grpc.aio.Channel, access: GatewayAccess) -> _Answer:
    stub: generation_pb2_grpc.GenerationServiceAsyncStub = generation_pb2_grpc.GenerationServiceStub(channel)
    request = generation_pb2.GetServerInfoRequest()
    info = await stub.GetServerInfo(request, timeout=_TIMEOUT_S, metadata=access.metadata)
    # A gateway of an older version has one model and does not list it.
    only = generation_pb2.ServedModel(verifier_state=info.verifier_state, drafter_state=info.drafter_state)
    served = list(info.served_models) or [only]
    findings = []
    for each in served:
        whose = f" of model {each.name or 'unknown'}" if len(served) > 1 else ""
        findings += _behind("verifier", each.verifier_state, whose) + _behind("drafter", each.drafter_state, whose)
    return info.models[0] if info.models else None, info.version, findings


_ASK = {"gateway": _ask_gateway, "drafter": _ask_drafter, "verifier": _ask_verifier}


def _behind(role: str, state: int, whose: str) -> list[Finding]:
    """What the gateway says of a service behind it, where that is not as it should be."""
    if state == _PeerState.PEER_STATE_REFUSED:
        message = f"it refuses its {role}{whose}: another tokenizer"
        advice = f"start the {role} with a checkpoint that has the gateway's tokenizer"
    elif state == _PeerState.PEER_STATE_UNREACHABLE:
        message, advice = f"it cannot reach its {role}{whose}", f"see its --{role}-address, and the {role}'s log"
    elif state == _PeerState.PEER_STATE_UNSPECIFIED:
        message, advice = f"it has no {role}{whose}: plain decoding", f"give it --{role}-address"
    else:
        return []
    return [problem("gateway", message, advice) if role == "verifier" else warning("gateway", message, advice)]


async def _about(
    role: str, address: str, channel: grpc.aio.Channel, model: types_pb2.ModelInfo, version: str
) -> list[Finding]:
    took = []
    for _ in range(_NUM_ROUND_TRIPS):
        started = time.monotonic()
        await _health(channel, role)
        took.append((time.monotonic() - started) * 1000)
    round_trip_ms = statistics.median(took)
    message = f"{address}: {describe_model(model)}, round trip {round_trip_ms:.2f} ms"
    advice = "every round waits for it: put the services closer together, or wait until the machine is quiet"
    findings = [warning(role, message, advice) if round_trip_ms > SLOW_ROUND_TRIP_MS else ok(role, message)]
    if version and version != __version__:
        message = f"it is version {version}, this is {__version__}"
        findings.append(warning(role, message, "run the same version everywhere"))
    return findings


def describe_model(model: types_pb2.ModelInfo) -> str:
    """Name, type, executor and tokenizer; without what the service has not: one that drafts from text has no type."""
    executor = f"{model.weight_format} by {model.executor}" if model.executor else ""
    tokenizer = f"tokenizer {model.tokenizer_fingerprint[:12]}" if model.tokenizer_fingerprint else ""
    return ", ".join(filter(None, (model.name, model.dtype, executor, tokenizer)))
