"""docker-compose.yml for real: up, both APIs, a lost drafter, a lost verifier in mid-stream, down."""

from __future__ import annotations

import asyncio
import json
import time
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from easyspec.cli.clients import Completion, GatewayClient, GenerateFlags, SamplingFlags, are_peers_ready, is_serving
from easyspec.speculation.parameters import StopConditions
from tests.containers.compose_stack import ComposeStack, find_engine

PROMPT = "def fibonacci(n):"
SHORT = GenerateFlags(PROMPT, SamplingFlags(seed=7, temperature=0.8), StopConditions(60, ignore_eos=True))
# Long enough that a container can be killed meanwhile.
LONG = replace(SHORT, stop=StopConditions(800, ignore_eos=True))
NUM_STREAMS = 4
LOADING_TIMEOUT_S = 600.0

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]


@dataclass
class Stream:
    """A completion on its way."""

    text: str = ""
    num_chunks: int = 0
    completion: Completion | None = field(default=None, repr=False)

    @property
    def statistics(self) -> Any:
        assert self.completion is not None, "the stream has ended"
        return self.completion.speculation


async def until(condition: Callable[[], Awaitable[bool]], within_s: float, what: str) -> None:
    """Ask again and again; fails if it does not come true in time."""
    deadline_s = time.monotonic() + within_s
    while not await condition():
        assert time.monotonic() < deadline_s, f"not within {within_s:g} s: {what}"
        await asyncio.sleep(0.5)


@pytest.fixture
async def stack() -> AsyncIterator[ComposeStack]:
    engine = find_engine()
    if isinstance(engine, str):
        pytest.skip(f"CONTAINERS NOT TESTED: {engine}")
    stack = ComposeStack(engine)
    try:
        await stack.compose("up", "--detach", "--build")
        await until(lambda: is_serving(stack.grpc_address), LOADING_TIMEOUT_S, "the gateway serves")
        await until(lambda: are_peers_ready(stack.grpc_address), 60, "the gateway has its drafter")
        yield stack
    finally:
        await stack.down()


async def generate(stack: ComposeStack, flags: GenerateFlags, stream: Stream | None = None) -> Stream:
    stream = stream or Stream()
    async with GatewayClient(stack.grpc_address) as client, aclosing(client.generate(flags)) as responses:
        async for response in responses:
            stream.text += response.text
            stream.num_chunks += 1
            stream.completion = response.completion
    return stream


def complete_over_rest(stack: ComposeStack, flags: GenerateFlags) -> str:
    body = {
        "model": "base",
        "prompt": flags.prompt,
        "seed": flags.sampling.seed,
        "temperature": flags.sampling.temperature,
        "max_tokens": flags.stop.max_tokens,
        "ignore_eos": flags.stop.ignore_eos,
    }
    request = urllib.request.Request(
        f"http://{stack.http_address}/v1/completions",
        data=json.dumps(body).encode(),
        headers={"content-type": "application/json"},
    )
    try:
        with urllib.request.urlopen(request, timeout=120) as response:
            return str(json.load(response)["choices"][0]["text"])
    except urllib.error.HTTPError as error:
        raise AssertionError(f"{error.code}: {error.read().decode(errors='replace')}") from error


async def test_the_stack_serves_and_survives(stack: ComposeStack) -> None:
    await check_hardening(stack)
    text = await check_both_apis(stack)
    await check_a_lost_drafter(stack, text)
    await check_a_lost_verifier(stack)


async def check_hardening(stack: ComposeStack) -> None:
    """As the compose file says: no process is root, only /tmp and /cache can be written, no capability is left."""
    for service in ("verifier", "drafter", "gateway"):
        (container,) = await stack.containers(service)
        assert (await stack.execute(container, "id", "-u")).strip() == "10001"
        host = (await stack.inspect(container))["HostConfig"]
        assert isinstance(host, dict)
        assert host["ReadonlyRootfs"] is True
        status = await stack.execute(container, "cat", "/proc/1/status")
        fields = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
        assert fields["CapEff"] == fields["CapBnd"] == "0" * 16
        assert fields["NoNewPrivs"].strip() == "1"
        await stack.execute(container, "python", "-c", "open('/tmp/x', 'w'); open('/cache/x', 'w')")


async def check_both_apis(stack: ComposeStack) -> str:
    drafted = await generate(stack, SHORT)
    assert drafted.statistics.num_accepted_tokens > 0
    assert (await generate(stack, replace(SHORT, is_drafting=False))).text == drafted.text
    assert await asyncio.to_thread(complete_over_rest, stack, SHORT) == drafted.text
    return drafted.text


async def check_a_lost_drafter(stack: ComposeStack, text: str) -> None:
    (drafter,) = await stack.containers("drafter")
    await stack.kill(drafter)
    without = await generate(stack, SHORT)
    assert without.text == text
    assert without.statistics.num_draft_rounds < without.statistics.num_rounds - 1
    assert await asyncio.to_thread(complete_over_rest, stack, SHORT) == text
    await stack.compose("up", "--detach")
    await until(lambda: are_peers_ready(stack.grpc_address), LOADING_TIMEOUT_S, "the drafter is used again")
    again = await generate(stack, SHORT)
    assert again.text == text
    assert again.statistics.num_accepted_tokens > 0


async def check_a_lost_verifier(stack: ComposeStack) -> None:
    flags = [replace(LONG, sampling=SamplingFlags(seed=seed, temperature=0.8)) for seed in range(NUM_STREAMS)]
    expected = [(await generate(stack, one)).text for one in flags]
    await stack.compose("up", "--detach", "--scale", "verifier=2")
    await until_all_verifiers_serve_requests(stack)
    streams = [Stream() for _ in flags]
    running = [asyncio.create_task(generate(stack, one, stream)) for one, stream in zip(flags, streams, strict=True)]

    async def all_have_begun() -> bool:
        return all(stream.num_chunks > 1 for stream in streams)

    await until(all_have_begun, 60, "all streams have begun")
    lost = (await stack.containers("verifier"))[0]
    await stack.kill(lost)
    assert any(stream.completion is None or not stream.completion.finish_reason for stream in streams), (
        "killed too late"
    )
    await asyncio.gather(*running)
    assert [stream.text for stream in streams] == expected
    assert sum(stream.statistics.num_verifier_failures for stream in streams) > 0
    assert len(await stack.containers("verifier")) == 1


async def until_all_verifiers_serve_requests(stack: ComposeStack) -> None:
    """The gateway finds a new replica when it next looks the name up, within a minute or so."""

    async def all_used() -> bool:
        await generate(stack, SHORT)
        containers = await stack.containers("verifier")
        logs = [await stack.logs(container) for container in containers]
        return len(containers) == 2 and all("VerifierService/Verify" in log for log in logs)

    await until(all_used, LOADING_TIMEOUT_S, "both verifiers are used")
