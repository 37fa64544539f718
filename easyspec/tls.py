"""What settings say about TLS, and which addresses may do without."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class ServerTls:
    """Files of a server, in PEM. With `client_ca` only clients whose certificate it has signed are let in."""

    certificate: Path
    key: Path
    client_ca: Path | None = None


@dataclass(frozen=True)
class ChannelTls:
    """Files of a client, in PEM. The server's certificate must be signed by `ca` (None: the system's) and name the
    host, or `server_name` if given; `certificate` and `key` are shown to servers that ask for one."""

    ca: Path | None = None
    certificate: Path | None = None
    key: Path | None = None
    server_name: str | None = None


def is_loopback(address: str) -> bool:
    """Whether `address` is reached on this machine alone: `host:port`, or a gRPC target such as `dns:///host:port` or
    `ipv4:address:port,address:port`."""
    places = address.rpartition("/")[2].removeprefix("ipv4:").removeprefix("ipv6:").split(",")
    hosts = [place.rpartition(":")[0].strip("[]") for place in places]
    try:
        return all(host == "localhost" or ipaddress.ip_address(host).is_loopback for host in hosts)
    except ValueError:
        return False
