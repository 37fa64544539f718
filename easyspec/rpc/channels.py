"""Channels to the other roles. A channel belongs to the event loop it was opened in."""

from __future__ import annotations

import json

import grpc

from easyspec.rpc.tls import channel_credentials
from easyspec.telemetry.trace_context import TRACEPARENT_KEY, current_traceparent
from easyspec.tls import ChannelTls

# A prompt of 131 072 token ids is at most 0.7 MB on the wire; 16 MiB leaves room for long chats as text.
MAX_MESSAGE_BYTES = 16 * 1024 * 1024
REQUEST_ID_KEY = "x-request-id"
_OPTIONS: tuple[tuple[str, int | str], ...] = (
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    # A peer that restarts is found again in well under a second; gRPC's own backoff grows to two minutes.
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 2_000),
    # A replica that was restarted may have another address; gRPC would not look again within 30 s.
    ("grpc.dns_min_time_between_resolutions_ms", 1_000),
    # Peers are neighbours: an http_proxy in the environment is not meant for them.
    ("grpc.enable_http_proxy", 0),
)


def open_channel(address: str, health_service: str | None = None, tls: ChannelTls | None = None) -> grpc.aio.Channel:
    """A channel to `address` (`host:port`, or `dns:///name:port` for several replicas), in plaintext without `tls`.

    Connects lazily and reconnects by itself; call it inside the running event loop and close it there. RPCs are
    spread over the replicas behind the name (round robin). With `health_service` (a full service name such as
    `easyspec.v1.VerifierService`) a replica that reports NOT_SERVING takes no new RPCs: they go elsewhere, or fail
    with UNAVAILABLE at once. Raises ConfigurationError if the files of `tls` cannot be used.
    """
    # pick_first, gRPC's default, would ignore both the other replicas and their health.
    service_config: dict[str, object] = {"loadBalancingConfig": [{"round_robin": {}}]}
    if health_service is not None:
        service_config["healthCheckConfig"] = {"serviceName": health_service}
    options = [*_OPTIONS, ("grpc.service_config", json.dumps(service_config))]
    if tls is None:
        return grpc.aio.insecure_channel(address, options=options)
    if tls.server_name is not None:
        options.append(("grpc.ssl_target_name_override", tls.server_name))
    return grpc.aio.secure_channel(address, channel_credentials(tls), options=options)


def request_metadata(request_id: str) -> tuple[tuple[str, str], ...]:
    """Metadata that carries the request id, and the trace if there is one, to the next service."""
    traceparent = current_traceparent()
    if traceparent is None:
        return ((REQUEST_ID_KEY, request_id),)
    return ((REQUEST_ID_KEY, request_id), (TRACEPARENT_KEY, traceparent))
