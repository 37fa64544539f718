from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
import textwrap
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from easyspec.cli.clients import GatewayClient, GenerateFlags, SamplingFlags, is_serving
from easyspec.cli.free_ports import free_port
from easyspec.cli.processes import ServiceFailedError, ServiceProcess, ServiceStack, StackSettings
from easyspec.cli.up import RoleLog, _computation
from easyspec.errors import ConfigurationError
from easyspec.speculation.parameters import StopConditions
from tests.cli.conftest import CHECKOUT
from tests.fakes.tiny_tokenizer import write_tokenizer

FAKES = {role: ("-m", "tests.fakes.services", role) for role in ("verifier", "drafter")}
FLAGS = GenerateFlags("def f(n):", SamplingFlags(temperature=0.0), StopConditions(max_tokens=40))


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.02)


@pytest.fixture
def settings(checkpoint: Path) -> StackSettings:
    return StackSettings(base=checkpoint, draft=checkpoint, commands=FAKES)


async def generate(address: str) -> tuple[str, int]:
    """Text, and how many rounds were drafted."""
    async with GatewayClient(address) as client:
        responses = [response async for response in client.generate(FLAGS)]
    return "".join(r.text for r in responses), responses[-1].completion.speculation.num_draft_rounds


async def test_a_stack_starts_serves_survives_its_drafter_and_stops(settings: StackSettings) -> None:
    lines: list[tuple[str, str]] = []
    async with ServiceStack(settings, lambda role, line: lines.append((role, line))) as stack:
        assert stack.drafter is not None
        text, num_draft_rounds = await generate(stack.gateway_address)
        assert num_draft_rounds > 0
        stack.drafter.kill()
        await stack.drafter.wait()
        assert not stack.drafter.is_running
        assert (await generate(stack.gateway_address))[0] == text
        await stack.drafter.start()
        await stack.drafter.wait_serving(60.0)
        assert await is_serving(stack.drafter.address)
        pids = [process.pid for process in stack.processes]
        assert all(is_alive(pid) for pid in pids)
    assert not any(is_alive(pid) for pid in pids)
    assert {role for role, _ in lines} == {"verifier", "drafter", "gateway"}


async def test_further_models_have_their_own_verifiers_and_share_the_drafter(settings: StackSettings) -> None:
    further = replace(settings, also={"other": settings.base})
    roles: set[str] = set()
    async with (
        ServiceStack(further, lambda role, line: roles.add(role)) as stack,
        GatewayClient(stack.gateway_address) as client,
    ):
        assert len(stack.processes) == 4
        assert roles == {"verifier", "verifier other", "drafter", "gateway"}
        served = {model.name: model for model in (await client.info()).served_models}
        assert list(served) == ["toy-base", "other"]
        assert {model.draft_model.name for model in served.values()} == {"toy-draft"}
        text = "".join([r.text async for r in client.generate(replace(FLAGS, model="other"))])
        assert text == (await generate(stack.gateway_address))[0]
        await killed(stack.also["other"])
        watch = asyncio.create_task(stack.watch())
        await until(lambda: stack.also["other"].is_running)
        watch.cancel()
        await asyncio.gather(watch, return_exceptions=True)


def test_a_further_model_of_another_tokenizer_is_decoded_plainly(settings: StackSettings, tmp_path: Path) -> None:
    other = write_tokenizer(tmp_path / "other", vocab_size=300)
    (other / "config.json").write_text("{}")
    further = replace(settings, also={"same": settings.base, "other": other})
    assert further.undrafted == {"other": other}
    stack = ServiceStack(further, lambda role, line: None)
    arguments = stack.gateway._arguments
    routes = json.loads(arguments[arguments.index("--further-models") + 1])
    assert {name: route.get("drafter_address") for name, route in routes.items()} == {"same": None, "other": "off"}


async def killed(process: ServiceProcess) -> int:
    """Kill a process; returns the id it had."""
    pid = process.pid
    process.kill()
    await process.wait()
    return pid


async def test_watching_restarts_verifiers_and_drafter_and_reports_a_lost_gateway(settings: StackSettings) -> None:
    async with ServiceStack(replace(settings, num_verifiers=2), lambda role, line: None) as stack:
        assert stack.drafter is not None
        text, _ = await generate(stack.gateway_address)
        watch = asyncio.create_task(stack.watch())
        for process in (stack.drafter, *stack.verifiers):
            old = await killed(process)
            await until(lambda process=process, old=old: process.is_running and process.pid != old)
            await process.wait_serving(20)
        assert (await generate(stack.gateway_address))[0] == text
        assert not watch.done()
        stack.gateway.kill()
        with pytest.raises(ServiceFailedError, match="gateway was killed by SIGKILL while serving"):
            await asyncio.wait_for(watch, 10)


async def test_a_verifier_that_does_not_stay_up_is_given_up(
    settings: StackSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("easyspec.cli.processes._RESTART_FIRST_S", 0.01)
    monkeypatch.setattr("easyspec.cli.processes._MAX_VITAL_RESTARTS", 2)
    async with ServiceStack(replace(settings, draft=None), lambda role, line: None) as stack:
        # What is started from now on ends at once.
        stack.verifier._arguments = ("-m", "tests.fakes.services", "crash")
        watch = asyncio.create_task(stack.watch())
        stack.verifier.kill()
        with pytest.raises(ServiceFailedError, match="verifier ended with exit code 2 after 2 restarts: crash"):
            await asyncio.wait_for(watch, 20)


def test_no_drafter_process_without_a_draft_model(settings: StackSettings) -> None:
    stack = ServiceStack(replace(settings, draft=None), lambda role, line: None)
    assert stack.drafter is None
    assert [process.role for process in stack.processes] == ["verifier", "gateway"]


async def test_without_a_draft_model_guesses_may_come_from_the_text(settings: StackSettings) -> None:
    said: list[str] = []
    from_text = replace(settings, draft=None, drafts_from_text=True, commands={"verifier": FAKES["verifier"]})
    async with ServiceStack(from_text, lambda role, line: None, said.append) as stack:
        text, num_draft_rounds = await generate(stack.gateway_address)
    assert text
    assert num_draft_rounds > 0
    assert said[0] == f"loading {settings.base.name} (0 MiB): verifier, drafter, gateway"
    assert sorted(line.partition(" ready after ")[0] for line in said[1:]) == ["drafter", "gateway", "verifier"]


async def test_a_service_that_ends_at_start_up_stops_the_others(settings: StackSettings) -> None:
    broken = replace(settings, commands=FAKES | {"drafter": ("-m", "tests.fakes.services", "crash")})
    stack = ServiceStack(broken, lambda role, line: None)
    with pytest.raises(ServiceFailedError, match="drafter ended with exit code 2 before it was ready: crash: no wei"):
        await stack.__aenter__()
    assert not any(process.is_running for process in stack.processes)


async def test_the_reason_of_a_role_is_given_and_not_what_its_launcher_says_after_it(settings: StackSettings) -> None:
    script = "import sys; print('drafter: no such model'); print('Traceback\\n' * 40); sys.exit(1)"
    stack = ServiceStack(replace(settings, commands=FAKES | {"drafter": ("-c", script)}), lambda role, line: None)
    with pytest.raises(ServiceFailedError, match=r"exit code 1 before it was ready: drafter: no such model$"):
        await stack.__aenter__()


def test_a_folder_that_is_no_checkpoint_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigurationError, match=r"draft is .* allowed: a checkpoint folder"):
        StackSettings(base=tmp_path, draft=tmp_path / "x").check()


@asynccontextmanager
async def up(checkpoint: Path) -> AsyncIterator[tuple[asyncio.subprocess.Process, list[str]]]:
    """`easyspec up` in a process of its own, and the addresses it serves."""
    script = textwrap.dedent(f"""
        import sys
        from pathlib import Path
        from easyspec.cli.processes import StackSettings
        from easyspec.cli.event_loop import run_until_signal
        from easyspec.cli.up import serve_until_cancelled
        folder = Path({str(checkpoint)!r})
        sys.exit(run_until_signal(serve_until_cancelled(StackSettings(folder, folder, commands={FAKES!r}))))
    """)
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", script, cwd=CHECKOUT, stderr=asyncio.subprocess.PIPE
    )
    assert process.stderr is not None
    seen: list[str] = []
    while not (line := (await process.stderr.readline()).decode()).startswith("ready: "):
        assert line, seen
        seen.append(line)
    addresses = [word.strip(",") for word in line.split() if ":" in word.strip(":")]
    banner = "".join([(await process.stderr.readline()).decode() for _ in range(3)])
    for word in ("model      ", "tokens of context", "tokens of KV memory", "computes   ", "guesses    by "):
        assert word in banner
    assert [await is_serving(address) for address in addresses] == [True, True, True]
    try:
        yield process, addresses
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def none_serves(addresses: list[str]) -> None:
    async with asyncio.timeout(15):
        while any([await is_serving(address) for address in addresses]):  # noqa: ASYNC110
            await asyncio.sleep(0.1)


@pytest.mark.parametrize(
    "number",
    [
        signal.SIGINT,
        pytest.param(signal.SIGTERM, marks=pytest.mark.slow),
        pytest.param(signal.SIGHUP, marks=pytest.mark.slow),  # the terminal was closed
    ],
)
async def test_a_signal_drains_and_stops_all(checkpoint: Path, number: signal.Signals) -> None:
    async with up(checkpoint) as (process, addresses):
        assert process.stderr is not None
        process.send_signal(number)
        rest = (await process.stderr.read()).decode()
        assert await process.wait() == 128 + number
        assert [await is_serving(address) for address in addresses] == [False, False, False]
    for role in ("verifier", "drafter", "gateway"):
        assert any(text.startswith(role) and "stopped" in text for text in rest.splitlines())
    assert "Traceback" not in rest


async def test_services_end_with_a_starter_that_was_killed(checkpoint: Path) -> None:
    async with up(checkpoint) as (process, addresses):
        process.kill()
        await process.wait()
        await none_serves(addresses)


@pytest.mark.slow
async def test_services_end_where_the_reader_of_the_log_has_ended(checkpoint: Path) -> None:
    """As with `easyspec up 2>&1 | tee log` and Ctrl-C, which ends tee at once."""
    async with up(checkpoint) as (process, addresses):
        transport = process._transport.get_pipe_transport(2)  # type: ignore[attr-defined]
        transport.close()
        process.send_signal(signal.SIGINT)
        assert await asyncio.wait_for(process.wait(), 30) == 128 + signal.SIGINT
        await none_serves(addresses)


def test_a_log_that_cannot_be_written_ends_the_program(monkeypatch: pytest.MonkeyPatch) -> None:
    raised: list[int] = []
    monkeypatch.setattr("signal.raise_signal", raised.append)
    reader, writer = os.pipe()
    os.close(reader)
    broken = open(writer, "w", buffering=1)  # noqa: SIM115
    monkeypatch.setattr("sys.stderr", broken)
    log = RoleLog()
    log("verifier", "hello")
    log("verifier", "not read either")
    monkeypatch.undo()
    with contextlib.suppress(BrokenPipeError):
        broken.close()
    assert raised == [signal.SIGTERM]


async def test_a_service_of_another_program_at_the_address_is_no_success(settings: StackSettings) -> None:
    address = f"127.0.0.1:{free_port('127.0.0.1')}"
    arguments = (*FAKES["verifier"], "--model", str(settings.base), "--address", address)
    other = ServiceProcess("verifier", arguments, address, lambda role, line: None)
    await other.start()
    try:
        await other.wait_serving(30)
        stack = ServiceStack(replace(settings, draft=None, verifier_address=other.address), lambda role, line: None)
        with pytest.raises(ServiceFailedError, match=r"verifier ended with exit code 2 .* cannot listen there"):
            await stack.__aenter__()
    finally:
        await other.stop(5)


@pytest.mark.parametrize(
    ("executor", "dtype", "is_widened"),
    [
        ("native-avx2", "bfloat16", True),
        ("native-avx512", "bfloat16", True),
        ("native-avx512_bf16", "bfloat16", False),
        ("native-avx2", "float32", False),
        ("reference", "bfloat16", False),
    ],
)
def test_the_banner_says_where_bfloat16_is_computed_in_float32(executor: str, dtype: str, is_widened: bool) -> None:
    said = _computation(executor, dtype, dtype)
    assert said.startswith(f"{executor}, {dtype} weights")
    assert ("products in float32" in said) is is_widened
