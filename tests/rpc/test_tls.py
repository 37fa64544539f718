"""TLS at real ports: who is let in, who is believed, and certificates that are renewed while the server runs."""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest

from easyspec.errors import ConfigurationError
from easyspec.rpc import convert, health
from easyspec.rpc.channels import open_channel
from easyspec.rpc.tls import ServerCertificates, channel_credentials
from easyspec.settings import load_settings
from easyspec.speculation.messages import OpenVerification
from easyspec.speculation.parameters import SamplingParameters, StopConditions
from easyspec.speculation.token_tree import EMPTY_TREE
from easyspec.tls import ChannelTls, ServerTls, is_loopback
from easyspec.v1 import verifier_pb2, verifier_pb2_grpc
from gateway.service.config import GatewaySettings
from tests.fakes.captured_logs import captured_logs
from tests.fakes.certificates import Authority, CertificateFiles
from tests.fakes.engines import FakeVerifierEngine
from tests.fakes.services import RunningService, running
from verifier_service.config import VerifierSettings
from verifier_service.server import VerifierServer

INFO = verifier_pb2.GetVerifierInfoRequest()


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path)


@pytest.fixture
def server_files(authority: Authority) -> CertificateFiles:
    return authority.issue("server")


@pytest.fixture
async def service(authority: Authority, server_files: CertificateFiles) -> AsyncIterator[RunningService]:
    """A server that asks for client certificates."""
    tls = ServerTls(server_files.certificate, server_files.key, authority.ca)
    async with running(VerifierServer(FakeVerifierEngine("base")), tls) as service:
        yield service


def client_tls(authority: Authority, name: str = "client", first_day: int = -1, last_day: int = 30) -> ChannelTls:
    files = authority.issue(name, first_day, last_day)
    return ChannelTls(authority.ca, files.certificate, files.key)


async def model_name(address: str, tls: ChannelTls | None, timeout_s: float = 5.0) -> str:
    async with open_channel(address, tls=tls) as channel:
        info = await verifier_pb2_grpc.VerifierServiceStub(channel).GetVerifierInfo(INFO, timeout=timeout_s)
        return str(info.model.name)


async def check_refused(address: str, tls: ChannelTls | None) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await model_name(address, tls)
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


async def test_a_client_with_a_certificate_of_the_authority_is_let_in(
    service: RunningService, authority: Authority
) -> None:
    assert await model_name(service.address, client_tls(authority)) == "base"


async def test_nobody_else_is(service: RunningService, authority: Authority, tmp_path: Path) -> None:
    await check_refused(service.address, None)
    await check_refused(service.address, ChannelTls(authority.ca))
    stranger = Authority(tmp_path, "stranger").issue("stranger")
    await check_refused(service.address, ChannelTls(authority.ca, stranger.certificate, stranger.key))
    await check_refused(service.address, client_tls(authority, "late", -20, -10))


async def test_a_server_is_not_believed_without_a_valid_certificate_of_the_authority(
    authority: Authority, tmp_path: Path
) -> None:
    for name, files in (
        ("expired", authority.issue("expired", -20, -10)),
        ("too early", authority.issue("early", 10, 20)),
        ("another's", Authority(tmp_path, "other").issue("other")),
        ("another host's", authority.issue("elsewhere", host="elsewhere.example")),
    ):
        tls = ServerTls(files.certificate, files.key)
        async with running(VerifierServer(FakeVerifierEngine("base")), tls) as service:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await model_name(service.address, ChannelTls(authority.ca))
            assert caught.value.code() is grpc.StatusCode.UNAVAILABLE, name


async def test_a_server_may_go_by_another_name_than_its_address(authority: Authority) -> None:
    files = authority.issue("verifier", host="verifier.internal")
    async with running(VerifierServer(FakeVerifierEngine("base")), ServerTls(files.certificate, files.key)) as service:
        assert await model_name(service.address, ChannelTls(authority.ca, server_name="verifier.internal")) == "base"


async def test_a_plaintext_port_is_no_tls_port(authority: Authority) -> None:
    async with running(VerifierServer(FakeVerifierEngine("base"))) as service:
        await check_refused(service.address, ChannelTls(authority.ca))


async def test_the_health_check_of_containers_speaks_tls(
    service: RunningService, authority: Authority, capsys: pytest.CaptureFixture[str]
) -> None:
    files = authority.issue("probe")
    flags = [service.address, "--tls-ca", str(authority.ca)]
    credentials = ["--tls-certificate", str(files.certificate), "--tls-key", str(files.key)]
    assert await asyncio.to_thread(health.main, [*flags, *credentials]) == 0
    assert await asyncio.to_thread(health.main, flags) == 1
    assert await asyncio.to_thread(health.main, [*flags, "--tls-key", str(files.key)]) == 1
    assert "together" in capsys.readouterr().err


# --- renewal ----------------------------------------------------------------------------------------------------


def serial_number(address: str, authority: Authority, tls: ChannelTls) -> str:
    """Of the certificate that a new connection is shown."""
    context = ssl.create_default_context(cafile=authority.ca)
    assert tls.certificate is not None
    context.load_cert_chain(tls.certificate, tls.key)
    context.set_alpn_protocols(["h2"])
    host, _, port = address.rpartition(":")
    with (
        socket.create_connection((host, int(port)), timeout=10) as plain,
        context.wrap_socket(plain, server_hostname="localhost") as connection,
    ):
        certificate = connection.getpeercert()
        assert certificate is not None
        return str(certificate["serialNumber"])


async def test_a_renewed_certificate_is_taken_up_while_streams_go_on(
    service: RunningService, authority: Authority
) -> None:
    tls = client_tls(authority)
    first = await asyncio.to_thread(serial_number, service.address, authority, tls)
    opening = OpenVerification((5, 6, 7), SamplingParameters(1), StopConditions())
    async with open_channel(service.address, tls=tls) as channel:
        call = verifier_pb2_grpc.VerifierServiceStub(channel).Verify(timeout=20)
        await call.write(verifier_pb2.VerifyRequest(open=convert.open_verification_to_pb(opening)))
        for base_length in (3, 4):
            await call.write(verifier_pb2.VerifyRequest(tree=convert.verify_tree_to_pb(base_length, EMPTY_TREE)))
            response = await call.read()
            assert response.verdict.base_length == base_length
            authority.issue("server")
        call.cancel()
    assert await asyncio.to_thread(serial_number, service.address, authority, tls) != first
    assert await model_name(service.address, tls) == "base"


async def test_a_renewal_that_went_wrong_leaves_the_old_certificate_in_force(
    service: RunningService, authority: Authority, server_files: CertificateFiles
) -> None:
    tls = client_tls(authority)
    first = await asyncio.to_thread(serial_number, service.address, authority, tls)
    key = server_files.key.read_bytes()
    with captured_logs() as logs:
        for broken in (b"", b"no PEM", authority.issue("another").key.read_bytes()):
            server_files.key.write_bytes(broken)
            for _ in range(2):  # said once, not at every connection
                assert await asyncio.to_thread(serial_number, service.address, authority, tls) == first
        server_files.key.unlink()
        assert await asyncio.to_thread(serial_number, service.address, authority, tls) == first
        server_files.key.write_bytes(key)
        assert await asyncio.to_thread(serial_number, service.address, authority, tls) == first
    assert logs.getvalue().count("certificate_not_renewed") == 3
    assert "PRIVATE KEY" not in logs.getvalue()


async def test_http_servers_take_a_renewed_certificate_up_too(
    authority: Authority, server_files: CertificateFiles
) -> None:
    certificates = ServerCertificates(ServerTls(server_files.certificate, server_files.key, authority.ca))

    async def close(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.close()

    server = await asyncio.start_server(close, "127.0.0.1", 0, ssl=certificates.ssl_context())
    async with server:
        address = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
        tls = client_tls(authority)
        first = await asyncio.to_thread(serial_number, address, authority, tls)
        authority.issue("server")
        assert await asyncio.to_thread(serial_number, address, authority, tls) != first


# --- start-up ---------------------------------------------------------------------------------------------------


def test_files_that_cannot_be_used_are_named(
    authority: Authority, server_files: CertificateFiles, tmp_path: Path
) -> None:
    missing, garbage = tmp_path / "missing.pem", tmp_path / "garbage.pem"
    garbage.write_text("garbage")
    other = authority.issue("other")
    for certificate, key, ca, named in (
        (missing, server_files.key, None, "missing.pem"),
        (server_files.certificate, garbage, None, "garbage.pem"),
        (server_files.certificate, other.key, None, "other.key"),
        (server_files.certificate, server_files.key, missing, "missing.pem"),
        (server_files.certificate, server_files.key, garbage, "garbage.pem"),
    ):
        with pytest.raises(ConfigurationError, match=named):
            ServerCertificates(ServerTls(certificate, key, ca))
    for tls in (ChannelTls(garbage), ChannelTls(None, server_files.certificate, other.key), ChannelTls(None, missing)):
        with pytest.raises(ConfigurationError):
            channel_credentials(tls)


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("127.0.0.1:1", True),
        ("127.1.2.3:1", True),
        ("localhost:1", True),
        ("[::1]:1", True),
        ("dns:///localhost:1", True),
        ("ipv4:127.0.0.1:1", True),
        ("ipv4:127.0.0.1:1,127.0.0.2:2", True),
        ("ipv4:127.0.0.1:1,10.0.0.1:2", False),
        ("0.0.0.0:1", False),
        ("[::]:1", False),
        ("10.0.0.1:1", False),
        ("verifier:50053", False),
        ("dns:///verifier:50053", False),
        ("localhost.example:1", False),
        ("127.0.0.1.example:1", False),
    ],
)
def test_what_is_on_this_machine(address: str, expected: bool) -> None:
    assert is_loopback(address) is expected


def test_plaintext_beyond_this_machine_does_not_start(server_files: CertificateFiles) -> None:
    flags = ["--model", "m", "--address", "0.0.0.0:50053"]
    with pytest.raises(ConfigurationError) as caught:
        load_settings(VerifierSettings, flags)
    for word in ("0.0.0.0:50053", "tls_certificate", "allow_plaintext"):
        assert word in str(caught.value)
    assert load_settings(VerifierSettings, [*flags, "--allow-plaintext", "true"]).server_tls is None
    tls = ["--tls-certificate", str(server_files.certificate), "--tls-key", str(server_files.key)]
    assert load_settings(VerifierSettings, [*flags, *tls]).server_tls is not None


def test_the_gateway_does_not_reach_beyond_this_machine_in_plaintext(authority: Authority) -> None:
    flags = ["--tokenizer", "t"]
    for name in ("verifier", "drafter"):
        with pytest.raises(ConfigurationError, match=f"{name}_address.*peer_tls_ca"):
            load_settings(GatewaySettings, [*flags, f"--{name}-address", "dns:///engines:1"])
    remote = [*flags, "--verifier-address", "verifier:1", "--drafter-address", "drafter:1"]
    assert load_settings(GatewaySettings, [*remote, "--allow-plaintext", "true"]).peer_tls is None
    assert load_settings(GatewaySettings, [*remote, "--peer-tls-ca", str(authority.ca)]).peer_tls is not None


@pytest.mark.parametrize(
    "flags",
    [
        ["--tls-certificate", "c"],
        ["--tls-key", "k"],
        ["--tls-client-ca", "ca"],
        ["--peer-tls-certificate", "c", "--peer-tls-key", "k"],
        ["--peer-tls-server-name", "n"],
        ["--peer-tls-ca", "ca", "--peer-tls-key", "k"],
    ],
)
def test_half_a_configuration_does_not_start(flags: list[str]) -> None:
    with pytest.raises(ConfigurationError, match="tls"):
        load_settings(GatewaySettings, ["--tokenizer", "t", *flags])
