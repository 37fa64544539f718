"""The command at a gateway that asks for a key and a certificate."""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path

import pytest

from easyspec.cli.clients import ANONYMOUS, access_from_environment, are_peers_ready
from easyspec.tls import ServerTls
from gateway.service.config import GatewaySettings
from gateway.service.server import GatewayServer
from gateway.text.tokenizer import Tokenizer
from tests.fakes.certificates import Authority
from tests.fakes.services import TOY_TEXT, ToyLanguage, running, running_pair
from tests.fakes.tiny_tokenizer import write_tokenizer

KEY = "sk-alice-0123456789"
ROOT = Path(__file__).parents[2]


async def generate(address: str, **variables: str) -> tuple[int, str]:
    """Exit code and what it said."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "easyspec.cli.main", "generate", "hello", "--max-tokens", "9", "--gateway", address),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        cwd=ROOT,
        env=os.environ | variables,
    )
    output, _ = await process.communicate()
    return process.returncode or 0, output.decode()


async def test_key_and_certificates_come_from_the_environment(tmp_path: Path) -> None:
    folder = write_tokenizer(tmp_path / "tokenizer")
    tokenizer = Tokenizer.load(folder)
    authority = Authority(tmp_path)
    server, client = authority.issue("server"), authority.issue("client")
    tls = {
        "EASYSPEC_TLS_CA": str(authority.ca),
        "EASYSPEC_TLS_CERTIFICATE": str(client.certificate),
        "EASYSPEC_TLS_KEY": str(client.key),
    }
    async with running_pair(ToyLanguage(tokenizer.encode(TOY_TEXT), 352, tokenizer.fingerprint)) as pair:
        settings = GatewaySettings(
            address="127.0.0.1:0",
            http_address="off",
            tokenizer=folder,
            verifier_address=pair.verifier_service.address,
            api_keys=f"alice:{KEY}",
        )
        gateway = GatewayServer(settings)
        async with running(gateway, ServerTls(server.certificate, server.key, authority.ca)) as service:
            code, output = await generate(service.address, EASYSPEC_API_KEY=KEY, **tls)
            assert code == 0, output
            code, output = await generate(service.address, **tls)
            assert code != 0
            assert "API key" in output


async def test_a_stack_does_not_wait_for_a_gateway_that_asks_for_a_key(tmp_path: Path) -> None:
    folder = write_tokenizer(tmp_path / "tokenizer")
    tokenizer = Tokenizer.load(folder)
    async with running_pair(ToyLanguage(tokenizer.encode(TOY_TEXT), 352, tokenizer.fingerprint)) as pair:
        settings = GatewaySettings(
            address="127.0.0.1:0",
            http_address="off",
            tokenizer=folder,
            verifier_address=pair.verifier_service.address,
            api_keys=f"alice:{KEY}",
        )
        async with running(GatewayServer(settings)) as service:
            assert await are_peers_ready(service.address)


def test_a_gateway_of_our_own_is_reached_in_plaintext(monkeypatch: pytest.MonkeyPatch) -> None:
    assert access_from_environment(is_own_gateway=False) == ANONYMOUS
    monkeypatch.setenv("EASYSPEC_TLS_CA", "ca.pem")
    monkeypatch.setenv("EASYSPEC_API_KEY", KEY)
    assert access_from_environment(is_own_gateway=True).tls is None
    access = access_from_environment(is_own_gateway=False)
    assert access.tls is not None
    assert access.metadata == (("authorization", f"Bearer {KEY}"),)
    assert KEY not in repr(access)
