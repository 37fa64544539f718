"""Checks of the ports that `easyspec up` takes: free, or taken by what."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import socket
from collections.abc import Sequence

from easyspec.cli.doctor.clients import role_at
from easyspec.cli.doctor.report import Finding, ok, problem, warning

_HTTP_TIMEOUT_S = 2.0
# What `easyspec up` takes unless told otherwise.
PORTS = (
    ("gateway", 50051, "--gateway-address"),
    ("drafter", 50052, "--drafter-address"),
    ("verifier", 50053, "--verifier-address"),
    ("rest", 8000, "--http-address"),
)


async def port_findings(ports: Sequence[tuple[str, int, str]] = PORTS, host: str = "127.0.0.1") -> list[Finding]:
    return [await _check(role, host, port, flag) for role, port, flag in ports]


async def _check(role: str, host: str, port: int, flag: str) -> Finding:
    check = f"port {port}"
    if _is_free(host, port):
        return ok(check, f"free, for {role}")
    other_port = f"stop what is there, or start with {flag} {host}:0"
    if role == "rest":
        if await asyncio.to_thread(_is_rest, host, port):
            return warning(check, "an easyspec gateway serves REST there", f"it runs already, or use {flag} {host}:0")
        return problem(check, "something else is there", other_port)
    found = await role_at(f"{host}:{port}")
    if found is None:
        return problem(check, "something else is there", other_port)
    if found != role:
        return warning(check, f"a {found} is there, where a {role} would be", other_port)
    return warning(check, f"a {role} runs there", f"it runs already: use it (--gateway), or use {flag} {host}:0")


def _is_free(host: str, port: int) -> bool:
    with contextlib.suppress(OSError), socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind((host, port))
        return True
    return False


def _is_rest(host: str, port: int) -> bool:
    """Whether `/version` answers as ours does."""
    connection = http.client.HTTPConnection(host, port, timeout=_HTTP_TIMEOUT_S)
    try:
        connection.request("GET", "/version")
        response = connection.getresponse()
        return response.status == 200 and b'"version"' in response.read(200)
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()
