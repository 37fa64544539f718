"""Connections between ranks that carry nothing: one that breaks means that a rank is gone.

A collective may not say so: NCCL waits for a rank that was killed, gloo for a machine that was unplugged, both until
the group's timeout. The kernel knows at once of a process that ended, and by keepalives of a machine that did.
"""

from __future__ import annotations

import json
import os
import secrets
import selectors
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterable

import structlog

from easyspec.errors import ConfigurationError
from easyspec.parallel.launch import EXIT_LOST, is_one_machine, master_host

# A machine that does not answer any more is noticed after 1 + 4 * 1 seconds.
_KEEPALIVE = {"TCP_KEEPIDLE": 1, "TCP_KEEPINTVL": 1, "TCP_KEEPCNT": 4}
# What the ordinary way out may take once a rank is gone. All in all a group is to end within 10 s, torchrun with it.
_EXIT_GRACE_S = 2.0
_MEETING_TIMEOUT_S = 60.0
_GREETING_TIMEOUT_S = 5.0
_GOODBYE = b"\1"
_LOOPBACK = "127.0.0.1"
_GREETING = struct.Struct("<16sI")  # the meeting's token, the rank

OnLost = Callable[[str], None]


class Lifeline:
    """Watches this rank's peers on a thread of its own: rank 0 has all others, they have rank 0.

    `on_lost(reason)` is called once, on that thread, if a peer goes without having left.
    """

    def __init__(self, peers: Iterable[socket.socket], on_lost: OnLost) -> None:
        self._peers = tuple(peers)
        self._on_lost = on_lost
        self._lock = threading.Lock()
        self._has_left = False
        if self._peers:
            threading.Thread(target=self._watch, name="lifeline", daemon=True).start()

    def leave(self) -> None:
        """Say that this rank is about to end, and the others may: no rank is missed any more. Idempotent."""
        with self._lock:
            self._has_left = True
            for peer in self._peers:
                try:
                    peer.send(_GOODBYE)
                    peer.shutdown(socket.SHUT_WR)
                except OSError:  # it was faster
                    continue

    def _watch(self) -> None:
        with selectors.DefaultSelector() as selector:
            for peer in self._peers:
                peer.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
                for name, value in _KEEPALIVE.items():
                    if hasattr(socket, name):
                        peer.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
                selector.register(peer, selectors.EVENT_READ, data=peer)
            while selector.get_map():
                for key, _ in selector.select():
                    readable: socket.socket = key.data
                    selector.unregister(readable)
                    reason = _loss(readable)
                    if self._let_go(readable, is_missed=reason is not None):
                        self._on_lost(reason or "")
                        return

    def _let_go(self, peer: socket.socket, is_missed: bool) -> bool:
        """Close the tie to a peer. One that is missed is a loss, True: the others learn it by losing us in turn."""
        with self._lock:
            is_loss = is_missed and not self._has_left
            for tied in self._peers if is_loss else (peer,):
                tied.close()
            return is_loss


def _loss(peer: socket.socket) -> str | None:
    """Why a connection that can be read means a loss; None if the peer said goodbye."""
    try:
        return None if peer.recv(1) == _GOODBYE else "its process ended"
    except OSError as error:
        return error.strerror or str(error)


def end_soon(reason: str) -> None:
    """Leave the process a moment for its ordinary way out, then end it: it may hang in a collective."""
    structlog.get_logger().error("rank_lost", reason=reason)
    time.sleep(_EXIT_GRACE_S)
    os._exit(EXIT_LOST)


def open_lifeline(rank: int, size: int, share: Callable[[bytes | None], bytes], on_lost: OnLost = end_soon) -> Lifeline:
    """Connect the ranks; all of them call it. `share` gives rank 0's bytes to the others: where it waits for them, and
    a token that they know each other by.

    Raises ConfigurationError if they cannot reach rank 0.
    """
    if size == 1:
        return Lifeline((), on_lost)
    if rank > 0:
        return Lifeline([_meet(rank, *json.loads(share(None)))], on_lost)
    host = _own_host()
    # A rank that knows rank 0 by a name that means loopback here finds it by that name.
    place = ("" if host == _LOOPBACK and not is_one_machine() else host, 0)
    with socket.create_server(place, family=socket.AF_INET6 if ":" in host else socket.AF_INET) as listener:
        token = secrets.token_hex(16)
        share(json.dumps([host, listener.getsockname()[1], token]).encode())
        return Lifeline(_receive(listener, size - 1, token), on_lost)


def _own_host() -> str:
    """This machine's address on the way to where the ranks met, which is one that the others can reach."""
    if is_one_machine():
        return _LOOPBACK
    family, kind, protocol, _, place = socket.getaddrinfo(master_host(), 1, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.connect(place)  # a datagram socket: sends nothing
        host = str(probe.getsockname()[0])
    return _LOOPBACK if host.startswith("127.") or host == "::1" else host


def _meet(rank: int, host: str, port: int, token: str) -> socket.socket:
    host = master_host() if host == _LOOPBACK and not is_one_machine() else host
    try:
        connection = socket.create_connection((host, port), _MEETING_TIMEOUT_S)
        connection.sendall(_GREETING.pack(bytes.fromhex(token), rank))
    except OSError as error:
        raise ConfigurationError(
            f"rank {rank} cannot reach rank 0 at {host}:{port}: {error}; "
            "ranks need every TCP port between their machines"
        ) from error
    connection.settimeout(None)
    return connection


def _receive(listener: socket.socket, num_peers: int, token: str) -> list[socket.socket]:
    """A connection from every other rank; a connection without the token is closed."""
    peers: dict[int, socket.socket] = {}
    deadline_s = time.monotonic() + _MEETING_TIMEOUT_S
    while len(peers) < num_peers:
        listener.settimeout(max(deadline_s - time.monotonic(), 0.001))
        try:
            connection, _ = listener.accept()
        except OSError as error:
            missing = num_peers - len(peers)
            raise ConfigurationError(f"{missing} of {num_peers} ranks did not reach rank 0: {error}") from error
        rank = _greeted_by(connection, token)
        if rank is None:
            connection.close()
        else:
            peers[rank] = connection
    return list(peers.values())


def _greeted_by(connection: socket.socket, token: str) -> int | None:
    """The rank at the other end; None for another program."""
    connection.settimeout(_GREETING_TIMEOUT_S)
    greeting = b""
    try:
        while len(greeting) < _GREETING.size:
            part = connection.recv(_GREETING.size - len(greeting))
            if not part:
                return None
            greeting += part
    except OSError:
        return None
    connection.settimeout(None)
    shown, rank = _GREETING.unpack(greeting)
    return int(rank) if secrets.compare_digest(shown, bytes.fromhex(token)) else None
