"""Health check for containers: `python -m easyspec.rpc.health ADDRESS [SERVICE]` exits 0 if it is SERVING, else 1.

`--tls-ca`, `--tls-certificate`, `--tls-key` and `--tls-server-name` reach a port with TLS.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from easyspec.errors import ConfigurationError
from easyspec.rpc.tls import channel_credentials
from easyspec.tls import ChannelTls

_TIMEOUT_S = 3.0


def check(address: str, service: str = "", timeout_s: float = _TIMEOUT_S, tls: ChannelTls | None = None) -> str:
    """Status of `service` ("" for the whole server) at `address`: SERVING, NOT_SERVING or an error's code name."""
    options: list[tuple[str, int | str]] = [("grpc.enable_http_proxy", 0)]
    if tls is not None and tls.server_name is not None:
        options.append(("grpc.ssl_target_name_override", tls.server_name))
    if tls is None:
        channel = grpc.insecure_channel(address, options=options)
    else:
        channel = grpc.secure_channel(address, channel_credentials(tls), options=options)
    with channel:
        request = health_pb2.HealthCheckRequest(service=service)
        try:
            response = health_pb2_grpc.HealthStub(channel).Check(request, timeout=timeout_s)
        except grpc.RpcError as error:
            return str(error.code().name)
    return str(health_pb2.HealthCheckResponse.ServingStatus.Name(response.status))


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m easyspec.rpc.health")
    parser.add_argument("address", help="host:port")
    parser.add_argument("service", nargs="?", default="", help="full protobuf name; default: the whole server")
    parser.add_argument("--tls-ca", type=Path, help="PEM file the server is known by; turns TLS on")
    parser.add_argument("--tls-certificate", type=Path, help="PEM file to show to a server that asks for one")
    parser.add_argument("--tls-key", type=Path, help="PEM file with its private key")
    parser.add_argument("--tls-server-name", help="name in the server's certificate, if it is not the host")
    try:
        flags = parser.parse_args(arguments)
    except SystemExit as ending:  # argparse's 2 is not among the two codes that probes know
        return 0 if ending.code == 0 else 1
    tls = None
    if flags.tls_ca is not None:
        tls = ChannelTls(flags.tls_ca, flags.tls_certificate, flags.tls_key, flags.tls_server_name)
    try:
        status = check(flags.address, service=flags.service, tls=tls)
    except ConfigurationError as error:
        print(error, file=sys.stderr)
        return 1
    print(status)
    return 0 if status == "SERVING" else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
