"""Doctor on running services, ports, and as a command."""

from __future__ import annotations

import asyncio
import json
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from easyspec.cli.clients import GatewayAccess
from easyspec.cli.doctor.clients import check_peer, describe_model, role_at
from easyspec.cli.doctor.examination import Patient, examine
from easyspec.cli.doctor.ports import port_findings
from easyspec.cli.doctor.report import Finding, State, has_problem
from easyspec.v1 import types_pb2
from gateway.service.config import GatewaySettings
from gateway.service.server import GatewayServer
from gateway.text.tokenizer import Tokenizer
from tests.cli.conftest import CHECKOUT, Command
from tests.fakes.services import TOY_TEXT, FakePair, ToyLanguage, running, running_pair

KEY = "sk-doctor-0123456789"


@asynccontextmanager
async def all_services(checkpoint: Path, **fields: Any) -> AsyncIterator[tuple[str, str, FakePair]]:
    """Addresses of a gateway's gRPC and REST sides, and what is behind it."""
    tokenizer = Tokenizer.load(checkpoint)
    language = ToyLanguage(tokenizer.encode(TOY_TEXT), 352, tokenizer.fingerprint)
    async with running_pair(language) as pair:
        settings = GatewaySettings(
            address="127.0.0.1:0",
            http_address="127.0.0.1:0",
            tokenizer=checkpoint,
            verifier_address=pair.verifier_service.address,
            drafter_address=pair.drafter_service.address,
            **fields,
        )
        server = GatewayServer(settings)
        async with running(server) as service:
            yield service.address, f"127.0.0.1:{server.http_port}", pair


def of(check: str, findings: list[Finding]) -> list[Finding]:
    return [finding for finding in findings if finding.check == check]


async def test_services_that_fit(checkpoint: Path) -> None:
    async with all_services(checkpoint) as (gateway, _, pair):
        peers = {
            "gateway": gateway,
            "drafter": pair.drafter_service.address,
            "verifier": pair.verifier_service.address,
        }
        findings = await examine(Patient(checkpoint, None, peers))
        for role, name in (("gateway", "toy-base"), ("drafter", "toy-draft"), ("verifier", "toy-base")):
            (finding,) = of(role, findings)
            assert finding.state in (State.OK, State.WARNING)  # the latter only for a slow round trip
            assert f"{name}, float32" in finding.message
            assert "round trip" in finding.message
        (finding,) = of("peers", findings)
        assert finding.state is State.OK
        assert "gateway, drafter, verifier, --base" in finding.message
        assert not [finding for finding in findings if finding.check.startswith("port")]
        assert await role_at(gateway) == "gateway"
        assert await role_at(pair.drafter_service.address) == "drafter"


async def test_a_gateway_tells_of_what_is_behind_it(checkpoint: Path) -> None:
    async with all_services(checkpoint) as (gateway, _, pair):
        await pair.drafter_service.kill()
        async with asyncio.timeout(10):
            findings: list[Finding] = []
            while not findings or "its drafter" not in findings[-1].message:
                findings = (await check_peer("gateway", gateway)).findings
        assert findings[-1].state is State.WARNING
        assert findings[-1].message == "it cannot reach its drafter"


async def test_a_gateway_of_several_models_tells_whose_verifier_is_missing(checkpoint: Path) -> None:
    async with all_services(checkpoint, further_models={"small": {"verifier_address": "127.0.0.1:1"}}) as (gateway, *_):
        findings = (await check_peer("gateway", gateway)).findings
    (finding,) = [finding for finding in findings if finding.state is State.PROBLEM]
    assert finding.message == "it cannot reach its verifier of model small"


async def test_two_tokenizers_are_a_problem(checkpoint: Path) -> None:
    tokenizer = Tokenizer.load(checkpoint)
    language = ToyLanguage(tokenizer.encode(TOY_TEXT), 352, tokenizer.fingerprint)
    async with running_pair(language, ToyLanguage(language.token_ids, 352, "0ther")) as pair:
        peers = {"drafter": pair.drafter_service.address, "verifier": pair.verifier_service.address}
        findings = await examine(Patient(checkpoint, None, peers))
    (finding,) = of("peers", findings)
    assert finding.state is State.PROBLEM
    assert "drafter 0ther" in finding.message


def test_a_drafter_without_a_model_is_described_by_what_it_has() -> None:
    text_drafter = types_pb2.ModelInfo(name="text", tokenizer_fingerprint="0123456789abcdef")
    assert describe_model(text_drafter) == "text, tokenizer 0123456789ab"


async def test_an_absent_service_and_one_of_another_role(checkpoint: Path) -> None:
    absent = await check_peer("verifier", "127.0.0.1:1")
    assert absent.findings[0].state is State.PROBLEM
    assert "no answer from 127.0.0.1:1" in absent.findings[0].message
    async with all_services(checkpoint) as (gateway, _, _pair):
        other = await check_peer("verifier", gateway)
        assert other.findings[0].message == f"{gateway} is a gateway"


async def test_ports_free_taken_by_us_and_by_others(checkpoint: Path) -> None:
    def port_of(address: str) -> int:
        return int(address.rpartition(":")[2])

    async with all_services(checkpoint) as (gateway, rest, pair):
        with socket.socket() as foreign, socket.socket() as free:
            foreign.bind(("127.0.0.1", 0))
            foreign.listen()
            free.bind(("127.0.0.1", 0))
            free_port = free.getsockname()[1]
            free.close()
            ports = [
                ("gateway", port_of(gateway), "--gateway-address"),
                ("drafter", port_of(pair.verifier_service.address), "--drafter-address"),
                ("rest", port_of(rest), "--http-address"),
                ("rest", foreign.getsockname()[1], "--http-address"),
                ("verifier", free_port, "--verifier-address"),
            ]
            taken, wrong, ours, other, free_one = await port_findings(ports)
    assert (taken.state, taken.message) == (State.WARNING, "a gateway runs there")
    assert (wrong.state, wrong.message) == (State.WARNING, "a verifier is there, where a drafter would be")
    assert (ours.state, ours.message) == (State.WARNING, "an easyspec gateway serves REST there")
    assert (other.state, other.message) == (State.PROBLEM, "something else is there")
    assert "--http-address" in other.advice
    assert free_one.state is State.OK


# --- the command ------------------------------------------------------------------------------------------------


async def test_the_command_on_the_bundled_pair(easyspec_command: Command) -> None:
    ended = await easyspec_command("doctor", "--json")
    report = json.loads(ended.stdout)
    states = {entry["check"]: entry["state"] for entry in report["checks"]}
    assert states["base weights"] == states["draft weights"] == states["pair tokenizer"] == "ok"
    assert report["has_problem"] == (ended.code == 1)
    assert all(entry["advice"] for entry in report["checks"] if entry["state"] != "ok")


async def test_a_problem_is_exit_code_1_and_one_line(easyspec_command: Command, tmp_path: Path) -> None:
    ended = await easyspec_command("doctor", "--base", str(tmp_path / "none"), "--no-draft")
    assert ended.code == 1
    (line,) = [line for line in ended.stdout.splitlines() if line.startswith("problem  base config")]
    assert "is neither a folder, nor a .gguf file, nor a hub id →" in line
    refused = await easyspec_command("doctor", "--gateway", "nowhere")
    assert (refused.code, refused.stdout) == (2, "")


async def test_it_does_not_import_torch(checkpoint: Path) -> None:
    code = (
        "import asyncio, sys; from pathlib import Path; from easyspec.cli.doctor.examination import *; "
        f"asyncio.run(examine(Patient(Path({str(checkpoint)!r}), Path({str(checkpoint)!r})))); "
        "print([m for m in ('torch', 'transformers', 'tokenizers') if m in sys.modules])"
    )
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", code), cwd=CHECKOUT, stdout=asyncio.subprocess.PIPE
    )
    out, _ = await process.communicate()
    assert out == b"[]\n"


def test_only_problems_make_a_report_one_of_problems() -> None:
    warned = Finding("x", State.WARNING, "", "")
    assert not has_problem([warned, Finding("y", State.OK, "")])
    assert has_problem([warned, Finding("y", State.PROBLEM, "")])


async def test_a_gateway_that_asks_for_a_key_is_shown_the_one_of_the_environment(checkpoint: Path) -> None:
    async with all_services(checkpoint, api_keys=f"doctor:{KEY}") as (gateway, _, _pair):
        (finding,) = (await check_peer("gateway", gateway)).findings
        assert finding.state is State.PROBLEM
        assert finding.advice == "set EASYSPEC_API_KEY to a key that it knows"
        findings = await examine(Patient(checkpoint, None, {"gateway": gateway}, GatewayAccess(KEY)))
        (finding,) = of("gateway", findings)
        assert finding.state in (State.OK, State.WARNING)  # the latter only for a slow round trip
