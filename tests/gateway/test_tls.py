"""Mutual TLS through all three roles."""

from __future__ import annotations

import asyncio
from pathlib import Path

import grpc
import pytest

from easyspec.rpc.channels import open_channel
from easyspec.tls import ChannelTls, ServerTls
from easyspec.v1 import generation_pb2, generation_pb2_grpc, types_pb2
from gateway.service.config import GatewaySettings
from gateway.service.server import GatewayServer
from gateway.text.tokenizer import Tokenizer
from tests.fakes.certificates import Authority, CertificateFiles
from tests.fakes.services import TOY_TEXT, ToyLanguage, running, running_pair


def server_tls(authority: Authority, name: str) -> ServerTls:
    files = authority.issue(name)
    return ServerTls(files.certificate, files.key, authority.ca)


def settings(folder: Path, verifier: str, drafter: str, authority: Authority, own: CertificateFiles) -> GatewaySettings:
    return GatewaySettings(
        address="127.0.0.1:0",
        tokenizer=folder,
        verifier_address=verifier,
        drafter_address=drafter,
        peer_tls_ca=authority.ca,
        peer_tls_certificate=own.certificate,
        peer_tls_key=own.key,
        retry_first_ms=10,
        retry_max_ms=50,
    )


async def test_client_gateway_drafter_and_verifier_know_each_other_by_certificates(
    tokenizer: Tokenizer, tokenizer_folder: Path, tmp_path: Path
) -> None:
    roles, clients = Authority(tmp_path, "roles"), Authority(tmp_path, "clients")
    language = ToyLanguage(tokenizer.encode(TOY_TEXT), 352, tokenizer.fingerprint)
    request = generation_pb2.GenerateRequest(text="hello", stop=types_pb2.StopConditions(max_tokens=20))
    async with running_pair(language, tls=server_tls(roles, "engines")) as pair:
        addresses = pair.verifier_service.address, pair.drafter_service.address
        gateway = GatewayServer(settings(tokenizer_folder, *addresses, roles, roles.issue("gateway-to-engines")))
        async with running(gateway, server_tls(clients, "gateway")) as service:
            files = clients.issue("client")
            tls = ChannelTls(clients.ca, files.certificate, files.key)
            async with open_channel(service.address, tls=tls) as channel:
                call = generation_pb2_grpc.GenerationServiceStub(channel).Generate(request, timeout=20)
                chunks = [chunk async for chunk in call]
            assert sum(len(chunk.token_ids) for chunk in chunks) == 20
            assert chunks[-1].completion.speculation.num_accepted_tokens > 0
            # A client's certificate is none for the engines behind.
            async with open_channel(addresses[0], tls=ChannelTls(roles.ca, files.certificate, files.key)) as channel:
                with pytest.raises(grpc.aio.AioRpcError):
                    await channel.unary_unary("/easyspec.v1.VerifierService/GetVerifierInfo")(b"", timeout=5)


async def test_a_gateway_without_the_right_certificate_reaches_nobody(
    tokenizer: Tokenizer, tokenizer_folder: Path, tmp_path: Path
) -> None:
    roles, strangers = Authority(tmp_path, "roles"), Authority(tmp_path, "strangers")
    language = ToyLanguage(tokenizer.encode(TOY_TEXT), 352, tokenizer.fingerprint)
    async with running_pair(language, tls=server_tls(roles, "engines")) as pair:
        addresses = pair.verifier_service.address, pair.drafter_service.address
        gateway = GatewayServer(settings(tokenizer_folder, *addresses, roles, strangers.issue("stranger")))
        starting = asyncio.create_task(gateway.start())
        done, _ = await asyncio.wait([starting], timeout=0.5)
        starting.cancel()
        await asyncio.gather(starting, return_exceptions=True)
        await gateway.stop()
        assert not done
        assert pair.verifier.num_opened == 0
