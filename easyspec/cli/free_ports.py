"""Ports for processes that start later: free now, and no two the same."""

from __future__ import annotations

import errno
import random
import socket
from collections.abc import Sequence

from easyspec.errors import ConfigurationError

# Below what systems give to outgoing connections (from 32768 on Linux, 49152 elsewhere), so that none takes the port
# before its process listens.
_CANDIDATES: Sequence[int] = range(20_000, 32_768)

_given: set[int] = set()


def free_port(host: str) -> int:
    """A port of `host` that nothing listens on and that this process was not given before.

    Raises ConfigurationError when there is none, or when `host` is no address of this machine.
    """
    for port in random.sample(_CANDIDATES, len(_CANDIDATES)):
        if port not in _given and _is_free(host, port):
            _given.add(port)
            return port
    raise ConfigurationError(f"no port of {host!r} from {_CANDIDATES[0]} to {_CANDIDATES[-1]} is free")


def _is_free(host: str, port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind((host, port))
        except OSError as error:
            if error.errno in (errno.EADDRINUSE, errno.EACCES):
                return False
            raise ConfigurationError(f"cannot listen on {host!r}: {error}") from error
    return True
