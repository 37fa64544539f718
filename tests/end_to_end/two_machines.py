"""`python -m tests.end_to_end.two_machines --base DIR --draft DIR --logs DIR`: both roles over two machines, on one.

A machine is a network namespace; a veth pair is the cable between them. On each runs one torchrun node of each role:

    machine A (10.77.0.1)                    machine B (10.77.0.2)
    gateway, and this script                 verifier, rank 0: the gateway reaches it over the cable
    verifier, rank 1                         drafter, rank 1
    drafter, rank 0

Prints one line of JSON: whether the tokens are those of one rank alone; with `--disturb` also whether they still are
when the cable is pulled out in mid-stream and put back; torchrun ends on both machines, this script starts it again.

It runs itself in namespaces of users, processes and networks, all of which end with it, however it ends: nothing is
left behind and nothing outside is touched. Root is not needed where the kernel lets users make namespaces.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from easyspec.cli.clients import GatewayClient, GenerateFlags, SamplingFlags, are_peers_ready, is_serving
from easyspec.cli.processes import ServiceStack, StackSettings
from easyspec.parallel.launch import die_with_parent
from easyspec.speculation.parameters import StopConditions

CABLE = "cable"
HOST_A, HOST_B = "10.77.0.1", "10.77.0.2"
VERIFIER, DRAFTER, GATEWAY = f"{HOST_B}:50053", f"{HOST_A}:50052", f"{HOST_A}:50051"
NAMESPACES = ("unshare", "--user", "--map-root-user", "--net", "--pid", "--fork", "--kill-child", "--mount-proc")
INSIDE = "EASYSPEC_TWO_MACHINES"
READY_S, LIMIT_S = 180.0, 500.0
REPOSITORY = Path(__file__).resolve().parents[2]

GREEDY = GenerateFlags(
    "def fibonacci(n):", SamplingFlags(seed=7, temperature=0.0), StopConditions(32, ignore_eos=True), num_nodes=15
)
SAMPLED = replace(GREEDY, sampling=SamplingFlags(seed=7, temperature=0.8))
LONG = replace(SAMPLED, stop=StopConditions(120, ignore_eos=True))
PROMPTS = ("class Stack:", "import os", "for i in range(10):", "return")
REQUESTS = tuple(
    replace(flags, prompt=prompt, sampling=replace(flags.sampling, seed=seed))
    for seed, prompt in enumerate(PROMPTS)
    for flags in (GREEDY, SAMPLED)
)


def why_not() -> str | None:
    """Why two machines cannot be made here; None if they can."""
    try:
        probe = subprocess.run(
            [*NAMESPACES, "ip", "link", "add", CABLE, "type", "veth"], capture_output=True, text=True
        )
    except OSError as error:
        return str(error)
    return None if probe.returncode == 0 else probe.stderr.strip()


@dataclass(frozen=True)
class Machine:
    """Where commands run: here, or in the network of the process `pid`."""

    host: str
    pid: int | None = None

    async def start(self, *command: str, log: Path | None = None) -> asyncio.subprocess.Process:
        enter = () if self.pid is None else ("nsenter", "--target", str(self.pid), "--net")
        environment = os.environ | {"GLOO_SOCKET_IFNAME": CABLE, "PYTHONUNBUFFERED": "1"}
        with contextlib.ExitStack() as stack:
            output = None if log is None else stack.enter_context(log.open("ab"))
            return await asyncio.create_subprocess_exec(
                *enter,
                *command,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=output,
                stderr=None if output is None else asyncio.subprocess.STDOUT,
                env=environment,
                cwd=REPOSITORY,
            )

    async def run(self, *command: str) -> None:
        process = await self.start(*command)
        if await process.wait() != 0:
            raise RuntimeError(f"{' '.join(command)}: exit code {process.returncode}")


async def connect_machines() -> tuple[Machine, Machine]:
    """This machine, and another one at the other end of a cable. Both end with this process."""
    a = Machine(HOST_A)
    holder = await a.start("unshare", "--net", "sleep", "infinity")
    b = Machine(HOST_B, holder.pid)
    own_network = os.readlink("/proc/self/ns/net")
    while os.readlink(f"/proc/{holder.pid}/ns/net") == own_network:  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    await a.run("ip", "link", "add", CABLE, "type", "veth", "peer", "name", CABLE, "netns", str(holder.pid))
    for machine in (a, b):
        await machine.run("ip", "address", "add", f"{machine.host}/24", "dev", CABLE)
        for device in ("lo", CABLE):
            await machine.run("ip", "link", "set", device, "up")
    return a, b


@dataclass(frozen=True)
class Cluster:
    """Two machines and what runs on them; output goes to files in `logs`."""

    a: Machine
    b: Machine
    base: Path
    draft: Path
    logs: Path

    async def start_roles(self) -> list[asyncio.subprocess.Process]:
        """A torchrun node of each role on each machine."""
        return [
            await self._start_node(machine, node_rank, master, role, address, model)
            for role, address, model, master, other in (
                ("verifier", VERIFIER, self.base, self.b, self.a),
                ("drafter", DRAFTER, self.draft, self.a, self.b),
            )
            for node_rank, machine in enumerate((master, other))
        ]

    async def _start_node(
        self, machine: Machine, node_rank: int, master: Machine, role: str, address: str, model: Path
    ) -> asyncio.subprocess.Process:
        meeting = ("--master-addr", master.host, "--master-port", "29500")
        torchrun = ("torch.distributed.run", "--nnodes", "2", "--node-rank", str(node_rank), "--nproc-per-node", "1")
        service = ("-m", f"{role}_service", "--model", str(model), "--address", address, "--allow-plaintext", "true")
        log = self.logs / f"{role}-{node_rank}.log"
        return await machine.start(sys.executable, "-m", *torchrun, *meeting, *service, log=log)

    async def start_gateway(self) -> asyncio.subprocess.Process:
        wiring = ("--address", GATEWAY, "--verifier-address", VERIFIER, "--drafter-address", DRAFTER)
        flags = ("--http-address", "off", "--allow-plaintext", "true")
        patience = ("--retry-first-ms", "20", "--retry-max-ms", "100", "--draft-deadline-ms", "60000")
        command = (sys.executable, "-m", "gateway", "--tokenizer", str(self.base), *wiring, *flags, *patience)
        return await self.a.start(*command, log=self.logs / "gateway.log")

    async def plug(self, is_in: bool) -> None:
        await self.a.run("ip", "link", "set", CABLE, "up" if is_in else "down")


async def until(condition: str, is_met: Callable[[], Awaitable[bool]]) -> None:
    """Raises TimeoutError that names the condition."""
    try:
        async with asyncio.timeout(READY_S):
            while not await is_met():  # noqa: ASYNC110
                await asyncio.sleep(0.1)
    except TimeoutError:
        raise TimeoutError(f"not after {READY_S:g} s: {condition}") from None


async def until_all_serve() -> None:
    for address in (VERIFIER, DRAFTER, GATEWAY):
        await until(f"{address} serves", partial(is_serving, address))
    await until("the gateway uses the drafter", partial(are_peers_ready, GATEWAY))


async def tokens_of(client: GatewayClient, flags: GenerateFlags) -> tuple[int, ...]:
    async with aclosing(client.generate(flags)) as responses:
        return tuple([token async for response in responses for token in response.token_ids])


async def said_by_one_rank(base: Path, requests: Sequence[GenerateFlags]) -> list[tuple[int, ...]]:
    """What one verifier says without a drafter, which never matters."""
    stack = ServiceStack(StackSettings(base, None), lambda role, line: None)
    async with stack, GatewayClient(stack.gateway_address) as client:
        return [await tokens_of(client, flags) for flags in requests]


async def disturbed(
    client: GatewayClient, disturb: Callable[[], Coroutine[Any, Any, float]], expected: tuple[int, ...]
) -> dict[str, object]:
    """Ask for a long text and `disturb` when it begins, which says after how many seconds the groups had ended."""
    token_ids: list[int] = []
    disturbing: asyncio.Task[float] | None = None
    async with aclosing(client.generate(LONG)) as responses:
        async for response in responses:
            token_ids += response.token_ids
            disturbing = disturbing or asyncio.create_task(disturb())
    assert disturbing is not None, "a text has chunks"
    return {"groups_gone_s": await disturbing, "is_same_text": tuple(token_ids) == expected}


async def pull_the_cable_out(cluster: Cluster, nodes: Sequence[asyncio.subprocess.Process]) -> float:
    """Put it back, and start everything again, when torchrun has ended everywhere."""
    await cluster.plug(is_in=False)
    pulled_s = time.monotonic()
    exit_codes = [await node.wait() for node in nodes]
    gone_s = time.monotonic() - pulled_s
    if 0 in exit_codes:
        raise RuntimeError(f"torchrun ended with {exit_codes}: a group that is lost has failed")
    await cluster.plug(is_in=True)
    await cluster.start_roles()
    return gone_s


async def compare(base: Path, draft: Path, logs: Path, is_disturbing: bool) -> dict[str, object]:
    cluster = Cluster(*await connect_machines(), base, draft, logs)
    expected = await said_by_one_rank(base, (*REQUESTS, LONG))
    nodes = await cluster.start_roles()
    await cluster.start_gateway()
    await until_all_serve()
    async with GatewayClient(GATEWAY) as client:
        said = [await tokens_of(client, flags) for flags in REQUESTS]
        num_same = sum(ours == theirs for ours, theirs in zip(said, expected[:-1], strict=True))
        report: dict[str, object] = {"requests": len(said), "same": num_same}
        if is_disturbing:
            report |= await disturbed(client, partial(pull_the_cable_out, cluster, nodes), expected[-1])
        return report


async def limited(report: Coroutine[Any, Any, dict[str, object]]) -> dict[str, object]:
    async with asyncio.timeout(LIMIT_S):
        return await report


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.end_to_end.two_machines")
    parser.add_argument("--base", type=Path, required=True, help="checkpoint folder of the base model")
    parser.add_argument("--draft", type=Path, required=True, help="checkpoint folder of the draft model")
    parser.add_argument("--logs", type=Path, required=True, help="an empty folder for what the services print")
    parser.add_argument("--disturb", action="store_true", help="also pull the cable out in mid-stream")
    flags = parser.parse_args()
    if INSIDE not in os.environ:
        die_with_parent()
        command = [*NAMESPACES, sys.executable, "-m", "tests.end_to_end.two_machines", *sys.argv[1:]]
        os.execvpe(command[0], command, os.environ | {INSIDE: "1"})
    try:
        report = asyncio.run(limited(compare(flags.base, flags.draft, flags.logs, flags.disturb)))
    except BaseException:
        for log in sorted(flags.logs.iterdir()):
            print(f"--- {log.name}\n{log.read_text(errors='replace')[-4000:]}", file=sys.stderr)
        raise
    print(json.dumps(report), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
