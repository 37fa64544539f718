"""Telling a starter that this very process serves, as systemd's services do (sd_notify)."""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
from collections.abc import Mapping

_VARIABLE = "NOTIFY_SOCKET"
_READY = b"READY=1"


class ReadinessSocket:
    """The starter's side: one for each start of a process, which is given `environment`."""

    def __init__(self) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
        name = f"easyspec-{os.getpid()}-{secrets.token_hex(8)}"
        self._socket.bind(f"\0{name}")  # in no folder: it goes with the socket
        self.environment: Mapping[str, str] = {_VARIABLE: f"@{name}"}
        self._is_ready = False

    @property
    def is_ready(self) -> bool:
        with contextlib.suppress(BlockingIOError):
            while not self._is_ready:
                self._is_ready = _READY in self._socket.recv(4096).split(b"\n")
        return self._is_ready

    def close(self) -> None:
        self._socket.close()


def tell_ready() -> None:
    """Say that this process serves; nothing happens where no starter listens."""
    name = os.environ.get(_VARIABLE, "")
    if not name:
        return
    address = f"\0{name[1:]}" if name.startswith("@") else name
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notice:
        notice.sendto(_READY, address)
