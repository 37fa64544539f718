"""Two verifiers and two drafters behind proxies, a gateway before them, and a supervisor that starts them again."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from bench.chaos.clients import Held, held_memory
from bench.chaos.proxy import FaultyProxy
from easyspec.cli.clients import is_serving
from easyspec.cli.free_ports import free_port
from easyspec.cli.processes import DRAFTER, GATEWAY, VERIFIER, ServiceProcess

_RESTART_PAUSE_S = 0.5
_READY_TIMEOUT_S = 600.0
_STOP_GRACE_S = 10.0
_NUM_REPLICAS = 2


@dataclass(eq=False)
class Replica:
    """One process behind its proxy. `num_faults` counts faults that are not over: at most one at a time."""

    process: ServiceProcess
    proxy: FaultyProxy
    num_faults: int = 0

    @property
    def role(self) -> str:
        return self.process.role

    def send(self, number: signal.Signals) -> None:
        if self.process.is_running:
            os.kill(self.process.pid, number)

    async def held(self) -> Held | None:
        """What sessions hold of the process; None if it does not answer."""
        return await held_memory(self.process.address, is_verifier=self.role == VERIFIER)


class ChaosStack:
    """Started by `async with`, which returns when all serve; whatever was started is stopped again. Each process logs
    to a file of its own in the folder `logs`."""

    def __init__(self, base: Path, draft: Path, engine_flags: tuple[str, ...], logs: Path) -> None:
        self._logs = logs
        self._models = {VERIFIER: base, DRAFTER: draft}
        self._tokenizer = base
        self._engine_flags = engine_flags
        self._cleanup = AsyncExitStack()
        self.replicas: list[Replica] = []
        self.gateway: ServiceProcess | None = None

    @property
    def address(self) -> str:
        assert self.gateway is not None, "entered"
        return self.gateway.address

    @property
    def processes(self) -> Mapping[str, ServiceProcess]:
        assert self.gateway is not None, "entered"
        replicas = {f"{replica.role} {index}": replica.process for index, replica in enumerate(self.replicas)}
        return {**replicas, GATEWAY: self.gateway}

    async def __aenter__(self) -> Self:
        try:
            for role, model in self._models.items():
                for number in range(_NUM_REPLICAS):
                    arguments = ["--model", str(model), *self._engine_flags]
                    process = self._process(role, f"{role}_service", arguments, f"{role}-{number}.log")
                    proxy = await self._cleanup.enter_async_context(FaultyProxy(process.address))
                    await self._run(process)
                    self.replicas.append(Replica(process, proxy))
            addresses = {
                role: ",".join(each.proxy.address for each in self.replicas if each.role == role)
                for role in self._models
            }
            wiring = ["--verifier-address", addresses[VERIFIER], "--drafter-address", addresses[DRAFTER]]
            wiring += ["--tokenizer", str(self._tokenizer), "--http-address", "off"]
            self.gateway = self._process(GATEWAY, "gateway", wiring, "gateway.log")
            await self._run(self.gateway)
            for process in (*(each.process for each in self.replicas), self.gateway):
                await process.wait_serving(_READY_TIMEOUT_S)
            for replica in self.replicas:
                supervisor = asyncio.create_task(_keep(replica.process))
                self._cleanup.push_async_callback(_cancelled, supervisor)
        except BaseException:
            await self._cleanup.aclose()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._cleanup.aclose()

    async def is_healthy(self, replica: Replica) -> bool:
        """Whether it serves and no fault of ours is at work."""
        return replica.num_faults == 0 and replica.process.is_running and await is_serving(replica.process.address)

    def _process(self, role: str, module: str, arguments: list[str], log: str) -> ServiceProcess:
        address = f"127.0.0.1:{free_port('127.0.0.1')}"
        command = ["-m", module, "--address", address, *arguments]
        return ServiceProcess(role, command, address, lambda _role, _line: None, self._logs / log)

    async def _run(self, process: ServiceProcess) -> None:
        await process.start()
        self._cleanup.push_async_callback(_stopped, process)


async def _keep(process: ServiceProcess) -> None:
    while True:
        await process.wait()
        await asyncio.sleep(_RESTART_PAUSE_S)
        await process.start()


async def _stopped(process: ServiceProcess) -> None:
    if process.is_running:
        os.kill(process.pid, signal.SIGCONT)  # one that was stopped could not end
    await process.stop(_STOP_GRACE_S)


async def _cancelled(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
