"""Health check for containers: `python -m easyspec.rpc.health ADDRESS [SERVICE]` exits 0 if it is SERVING, else 1."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

_TIMEOUT_S = 3.0
_USAGE = "usage: python -m easyspec.rpc.health ADDRESS [SERVICE]"


def check(address: str, service: str = "", timeout_s: float = _TIMEOUT_S) -> str:
    """Status of `service` ("" for the whole server) at `address`: SERVING, NOT_SERVING or an error's code name."""
    with grpc.insecure_channel(address, options=[("grpc.enable_http_proxy", 0)]) as channel:
        request = health_pb2.HealthCheckRequest(service=service)
        try:
            response = health_pb2_grpc.HealthStub(channel).Check(request, timeout=timeout_s)
        except grpc.RpcError as error:
            return str(error.code().name)
    return str(health_pb2.HealthCheckResponse.ServingStatus.Name(response.status))


def main(arguments: Sequence[str]) -> int:
    if len(arguments) not in (1, 2):
        print(_USAGE, file=sys.stderr)
        return 1
    status = check(arguments[0], service="".join(arguments[1:]))
    print(status)
    return 0 if status == "SERVING" else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
