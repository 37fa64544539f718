"""A certificate authority for tests."""

from __future__ import annotations

import datetime
import ipaddress
import os
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

_DAY = datetime.timedelta(days=1)


@dataclass(frozen=True)
class CertificateFiles:
    """PEM files of one certificate and its key."""

    certificate: Path
    key: Path


class Authority:
    """Signs certificates; `ca` is the PEM file it is known by."""

    def __init__(self, folder: Path, name: str = "authority") -> None:
        self._folder = folder
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = _name(name)
        self.ca = folder / f"{name}.pem"
        builder = _builder(self._name, self._name, self._key, -1, 30)
        builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        certificate = builder.sign(self._key, hashes.SHA256())
        self.ca.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))

    def issue(self, name: str, first_day: int = -1, last_day: int = 30, host: str | None = None) -> CertificateFiles:
        """A certificate for `host` (default: 127.0.0.1 and localhost), valid on these days counted from now. Files of
        the same name are replaced, each at once, as certificate managers do it."""
        key = ec.generate_private_key(ec.SECP256R1())
        names: list[x509.GeneralName] = [x509.DNSName(host or "localhost")]
        if host is None:
            names.append(x509.IPAddress(ipaddress.ip_address("127.0.0.1")))
        builder = _builder(_name(name), self._name, key, first_day, last_day)
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
        certificate = builder.sign(self._key, hashes.SHA256())
        files = CertificateFiles(self._folder / f"{name}.crt", self._folder / f"{name}.key")
        encoding, pem = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
        _replace(files.key, key.private_bytes(encoding, pem, serialization.NoEncryption()))
        _replace(files.certificate, certificate.public_bytes(encoding))
        return files


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePrivateKey, first_day: int, last_day: int
) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now + first_day * _DAY)
        .not_valid_after(now + last_day * _DAY)
    )


def _name(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


def _replace(path: Path, content: bytes) -> None:
    fresh = path.with_suffix(path.suffix + ".new")
    fresh.write_bytes(content)
    os.replace(fresh, path)
