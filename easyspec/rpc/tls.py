"""TLS and mutual TLS: certificates from files, taken up anew when they are renewed; and where plaintext is allowed."""

from __future__ import annotations

import contextlib
import ssl
import threading
from dataclasses import dataclass
from pathlib import Path

import grpc
import structlog

from easyspec.errors import ConfigurationError
from easyspec.tls import ChannelTls, ServerTls

_Stamp = tuple[tuple[int, int, int], ...]

_log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class _Loaded:
    stamp: _Stamp
    certificate: bytes
    key: bytes
    client_ca: bytes | None
    context: ssl.SSLContext


class ServerCertificates:
    """A server's certificate as it is in its files now; for gRPC and for HTTP.

    Renewed files are taken up by the next connection, if they belong together; until then, and if they are broken,
    the certificate before them stays in force. Raises ConfigurationError at construction. Thread-safe: gRPC asks on
    threads of its own.
    """

    def __init__(self, tls: ServerTls) -> None:
        self._tls = tls
        self._lock = threading.Lock()
        self._rejected: _Stamp | None = None
        self._loaded = _load(tls)

    def grpc_credentials(self) -> grpc.ServerCredentials:
        return grpc.dynamic_ssl_server_credentials(
            _grpc_configuration(self._loaded),
            lambda: _grpc_configuration(self._current()),
            require_client_authentication=self._tls.client_ca is not None,
        )

    def ssl_context(self) -> ssl.SSLContext:
        """A context for an HTTP server of the event loop; every handshake gets the certificate of its time."""
        context = _load(self._tls).context

        def renew(connection: ssl.SSLObject, _name: str | None, _context: ssl.SSLContext) -> None:
            connection.context = self._current().context

        context.sni_callback = renew
        return context

    def _current(self) -> _Loaded:
        with self._lock:
            try:
                stamp = _stamp(self._tls)
            except OSError:  # between the old file and the new one
                return self._loaded
            if stamp in (self._loaded.stamp, self._rejected):
                return self._loaded
            try:
                self._loaded = _load(self._tls)
            except ConfigurationError as error:
                self._rejected = stamp
                _log.warning("certificate_not_renewed", reason=str(error))
            else:
                _log.info("certificate_renewed", certificate=str(self._tls.certificate))
            return self._loaded


def channel_credentials(tls: ChannelTls) -> grpc.ChannelCredentials:
    """Credentials of a client, as its files are now; ConfigurationError if they cannot be used."""
    if (tls.certificate is None) != (tls.key is None):
        raise ConfigurationError("a client certificate and its key must be given together")
    if tls.ca is not None:
        _check_ca(tls.ca)
    if tls.certificate is not None and tls.key is not None:
        _load_chain(ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT), tls.certificate, tls.key)
    roots, key, chain = (_read(path) if path is not None else None for path in (tls.ca, tls.key, tls.certificate))
    return grpc.ssl_channel_credentials(root_certificates=roots, private_key=key, certificate_chain=chain)


def _load(tls: ServerTls) -> _Loaded:
    try:
        stamp = _stamp(tls)
    except OSError as error:
        raise ConfigurationError(f"{error.filename}: {error.strerror}") from None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    _load_chain(context, tls.certificate, tls.key)
    if tls.client_ca is not None:
        _check_ca(tls.client_ca)
        context.load_verify_locations(tls.client_ca)
        context.verify_mode = ssl.CERT_REQUIRED
    client_ca = _read(tls.client_ca) if tls.client_ca is not None else None
    loaded = _Loaded(stamp, _read(tls.certificate), _read(tls.key), client_ca, context)
    with contextlib.suppress(OSError):
        if stamp == _stamp(tls):
            return loaded
    raise ConfigurationError(f"{tls.certificate}: changed while it was read")


def _load_chain(context: ssl.SSLContext, certificate: Path, key: Path) -> None:
    try:
        context.load_cert_chain(certificate, key, password=_no_password)
    except (OSError, ValueError) as error:  # SSLError is an OSError
        reason = getattr(error, "reason", None) or getattr(error, "strerror", None) or str(error)
        raise ConfigurationError(f"certificate {certificate} and key {key} cannot be used together: {reason}") from None


def _no_password() -> str:
    # Without this OpenSSL would ask on the terminal.
    raise ValueError("the key is encrypted; allowed: one that is not")


def _check_ca(ca: Path) -> None:
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(ca)
    except OSError as error:
        reason = getattr(error, "reason", None) or error.strerror
        raise ConfigurationError(f"certificate authority {ca} cannot be used: {reason}") from None


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigurationError(f"{path}: {error.strerror}") from None


def _stamp(tls: ServerTls) -> _Stamp:
    paths = (tls.certificate, tls.key) if tls.client_ca is None else (tls.certificate, tls.key, tls.client_ca)
    statuses = [path.stat() for path in paths]
    return tuple((status.st_mtime_ns, status.st_size, status.st_ino) for status in statuses)


def _grpc_configuration(loaded: _Loaded) -> grpc.ServerCertificateConfiguration:
    return grpc.ssl_server_certificate_configuration([(loaded.key, loaded.certificate)], loaded.client_ca)
