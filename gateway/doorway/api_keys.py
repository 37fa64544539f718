"""API keys: a client's name, found by the bearer token it presents."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import structlog

from easyspec.errors import CapacityError, ConfigurationError, UnauthenticatedError

MIN_KEY_CHARS = 16
_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
# What RFC 6750 allows a bearer token to consist of; so a comma can separate keys.
_KEY = re.compile(r"[A-Za-z0-9\-._~+/]+=*")
_DIGEST = re.compile(r"sha256:([0-9a-fA-F]{64})")
_MAX_PRESENTED_CHARS = 4096
_RETRY_AFTER_S = 1.0
_FORMS = "name:key or name:sha256:<64 hexadecimal digits>"

_log = structlog.get_logger()


@dataclass(frozen=True)
class ApiKey:
    """A client's name and the SHA-256 of its key. A name may have several keys, so that they can be rotated."""

    name: str
    digest: bytes


def name_of(keys: Iterable[ApiKey], presented: str) -> str | None:
    """The client whose key this is, or None. Takes the same time whichever key it is, or none."""
    digest = hashlib.sha256(presented.encode()).digest()
    found: str | None = None
    for key in keys:
        if hmac.compare_digest(key.digest, digest):
            found = key.name
    return found


def parse_keys(text: str, source: str) -> tuple[ApiKey, ...]:
    """The keys of `text`: one `name:key` or `name:sha256:HEX` a line (or between commas); `#` begins a comment line.

    Raises ConfigurationError naming `source` and the line, never what stands there: it may be a key.
    """
    keys: list[ApiKey] = []
    for number, line in enumerate(text.splitlines(), start=1):
        if line.lstrip().startswith("#"):
            continue
        for entry in filter(None, (part.strip() for part in line.split(","))):
            keys.append(_parse_key(entry, f"{source}, line {number}"))
    names_by_digest: dict[bytes, str] = {}
    for key in keys:
        if names_by_digest.setdefault(key.digest, key.name) != key.name:
            other = names_by_digest[key.digest]
            raise ConfigurationError(
                f"{source}: {key.name!r} and {other!r} have the same key; allowed: one client each"
            )
    return tuple(keys)


def _parse_key(entry: str, where: str) -> ApiKey:
    name, separator, key = entry.partition(":")
    if not separator:
        raise ConfigurationError(f"{where}: no colon; allowed: {_FORMS}")
    if not _NAME.fullmatch(name):
        raise ConfigurationError(f"{where}: the name must be 1 to 64 letters, digits, '.', '_' or '-'")
    if key.startswith("sha256:"):
        digest = _DIGEST.fullmatch(key)
        if digest is None:
            raise ConfigurationError(f"{where}: {name!r} has a malformed hash; allowed: {_FORMS}")
        return ApiKey(name, bytes.fromhex(digest.group(1)))
    if len(key) < MIN_KEY_CHARS or not _KEY.fullmatch(key):
        raise ConfigurationError(
            f"{where}: the key of {name!r} is too short or not fit for a header; allowed: at least {MIN_KEY_CHARS} "
            "letters, digits or any of -._~+/="
        )
    return ApiKey(name, hashlib.sha256(key.encode()).digest())


class ApiKeys:
    """The keys in force: those of `inline` and of `file`, which is read again when it changes.

    Raises ConfigurationError at construction if there is no key at all or one is malformed; later on such a file is
    logged and the keys before it stay in force. Running requests are not touched by a change.
    """

    def __init__(self, file: Path | None, inline: str | None) -> None:
        self._file = file
        self._inline = () if inline is None else parse_keys(inline, "api_keys")
        self._stamp = self._file_stamp()
        self._keys = self._read()

    def authenticate(self, authorization: str | None) -> str:
        """The client's name, by the value of its `Authorization` header; UnauthenticatedError if it is not known."""
        scheme, _, presented = (authorization or "").partition(" ")
        if not authorization:
            raise UnauthenticatedError("an API key is needed: send 'Authorization: Bearer <key>'")
        if scheme.lower() != "bearer" or not presented or len(presented) > _MAX_PRESENTED_CHARS:
            raise UnauthenticatedError("the Authorization header is malformed: send 'Authorization: Bearer <key>'")
        name = name_of(self._keys, presented.strip())
        if name is None:
            raise UnauthenticatedError("the API key is not known here")
        return name

    def reload(self) -> None:
        """Read the file again; on an error the keys stay as they are."""
        self._stamp = self._file_stamp()
        try:
            self._keys = self._read()
        except ConfigurationError as error:
            _log.error("api_keys_not_read", reason=str(error))
            return
        _log.info("api_keys_read", num_keys=len(self._keys))

    async def watch(self, interval_s: float) -> None:
        while True:
            await asyncio.sleep(interval_s)
            if self._file_stamp() != self._stamp:
                self.reload()

    def _read(self) -> tuple[ApiKey, ...]:
        keys = self._inline
        if self._file is not None:
            try:
                text = self._file.read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
                raise ConfigurationError(f"api_keys_file is {str(self._file)!r}: {reason}") from None
            keys = keys + parse_keys(text, str(self._file))
        if not keys:
            raise ConfigurationError(f"there is no API key in api_keys_file or api_keys; allowed: {_FORMS}")
        return keys

    def _file_stamp(self) -> tuple[int, int, int] | None:
        if self._file is None:
            return None
        try:
            status = self._file.stat()
        except OSError:
            return None
        return status.st_mtime_ns, status.st_size, status.st_ino


class ClientLimiter:
    """At most `max_running` choices of one client at a time; None: no limit."""

    def __init__(self, max_running: int | None) -> None:
        self._max_running = max_running
        self._num_running: Counter[str] = Counter()

    @contextlib.contextmanager
    def place(self, client: str, num_choices: int = 1) -> Iterator[None]:
        """Count a prompt of `client` while it runs; CapacityError if as many choices run as may, or would be more."""
        if self._max_running is None:
            yield
            return
        num_choices = min(num_choices, self._max_running)
        if self._num_running[client] + num_choices > self._max_running:
            raise CapacityError(
                f"{self._num_running[client]} choices of this API key are running; its limit is {self._max_running}",
                _RETRY_AFTER_S,
            )
        self._num_running[client] += num_choices
        try:
            yield
        finally:
            self._num_running[client] -= num_choices
            if not self._num_running[client]:
                del self._num_running[client]
