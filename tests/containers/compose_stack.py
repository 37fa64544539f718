"""The stack of docker-compose.yml under a name and on ports of its own, driven through whichever engine there is."""

from __future__ import annotations

import asyncio
import json
import os
import shlex
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from easyspec.cli.free_ports import free_port

CHECKOUT = Path(__file__).parents[2]
_PROBE_TIMEOUT_S = 60.0


@dataclass(frozen=True)
class Engine:
    """How to speak to the container engine: the compose command, and the engine's own."""

    compose: tuple[str, ...]
    containers: str


def find_engine() -> Engine | str:
    """The engine, or why there is none. `COMPOSE` names the compose command (say, `podman-compose`)."""
    wanted = shlex.split(os.environ.get("COMPOSE", ""))
    if not wanted and _works(["docker", "compose", "version"]) and _works(["docker", "info"]):
        return Engine(("docker", "compose"), "docker")
    if not wanted and _works(["podman-compose", "--version"]) and _works(["podman", "info"]):
        return Engine(("podman-compose",), "podman")
    if not wanted:
        return "neither `docker compose` nor `podman-compose` works here; COMPOSE may name another command"
    engines = [name for name in ("docker", "podman") if _works([name, "info"])]
    if not engines:
        return f"COMPOSE is {shlex.join(wanted)!r}, but neither docker nor podman answers"
    return Engine(tuple(wanted), engines[0])


def _works(command: Sequence[str]) -> bool:
    if shutil.which(command[0]) is None:
        return False
    try:
        return subprocess.run(command, capture_output=True, timeout=_PROBE_TIMEOUT_S, check=False).returncode == 0
    except subprocess.TimeoutExpired:
        return False


class ComposeStack:
    """One project of docker-compose.yml. `up` builds and starts, `down` removes containers, network and volumes."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.project = f"easyspec-test-{os.getpid()}"
        self.grpc_address = f"127.0.0.1:{free_port('127.0.0.1')}"
        self.http_address = f"127.0.0.1:{free_port('127.0.0.1')}"

    @property
    def _environment(self) -> Mapping[str, str]:
        return os.environ | {
            "COMPOSE_PROJECT_NAME": self.project,
            "EASYSPEC_GRPC_PORT": self.grpc_address.rpartition(":")[2],
            "EASYSPEC_HTTP_PORT": self.http_address.rpartition(":")[2],
        }

    async def compose(self, *arguments: str) -> str:
        """Run a compose command to its end; its output. Fails the test if it fails."""
        return await self._run(*self.engine.compose, *arguments)

    async def down(self) -> None:
        """Stop and remove everything, replicas included, of which podman-compose knows only the first."""
        project = f"label=com.docker.compose.project={self.project}"
        left = (await self._run(self.engine.containers, "ps", "--all", "--quiet", "--filter", project)).split()
        if left:
            await self._run(self.engine.containers, "stop", *left)
            await self._run(self.engine.containers, "rm", "--force", *left)
        await self.compose("down", "--volumes")

    async def containers(self, service: str) -> list[str]:
        """Ids of the service's running containers."""
        filters = [f"label=com.docker.compose.project={self.project}", f"label=com.docker.compose.service={service}"]
        flags = [flag for one in filters for flag in ("--filter", one)]
        return (await self._run(self.engine.containers, "ps", "--quiet", *flags)).split()

    async def kill(self, container: str) -> None:
        """SIGKILL."""
        await self._run(self.engine.containers, "kill", "--signal", "KILL", container)

    async def logs(self, container: str) -> str:
        return await self._run(self.engine.containers, "logs", container)

    async def inspect(self, container: str) -> dict[str, object]:
        (described,) = json.loads(await self._run(self.engine.containers, "inspect", container))
        return dict(described)

    async def execute(self, container: str, *command: str) -> str:
        return await self._run(self.engine.containers, "exec", container, *command)

    async def _run(self, *command: str) -> str:
        process = await asyncio.create_subprocess_exec(
            *command,
            cwd=CHECKOUT,
            env=self._environment,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        output = (await process.communicate())[0].decode(errors="replace")
        assert process.returncode == 0, f"{shlex.join(command)} ended with {process.returncode}:\n{output[-4000:]}"
        return output
