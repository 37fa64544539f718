"""The three services as child processes: start, wait until healthy, watch, stop."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

import easyspec
from easyspec.checkpoint.location import is_gguf, weight_bytes
from easyspec.cli.clients import are_peers_ready
from easyspec.cli.free_ports import free_port
from easyspec.errors import ConfigurationError, EasyspecError
from easyspec.parallel.launch import torchrun_arguments
from easyspec.rpc.readiness import ReadinessSocket
from easyspec.tokenizer_fingerprint import tokenizer_fingerprint
from easyspec.vocabulary import check_vocabularies, padding_note

FREE_PORT = "127.0.0.1:0"
HTTP_OFF = "off"
# As the gateway spells it, of a further model.
NO_DRAFTER = "off"
TEXT_SOURCES = "retrieval,ngram"
VERIFIER, DRAFTER, GATEWAY = "verifier", "drafter", "gateway"

# The parent of the packages, where a checkout has its models and benchmarks too.
CHECKOUT = Path(easyspec.__file__).resolve().parents[1]
DEFAULT_BASE = CHECKOUT / "models" / "base"
DEFAULT_DRAFT = CHECKOUT / "models" / "draft"

# torchrun says twenty lines about a rank that ended.
_NUM_KEPT_LINES = 100
_MAX_LINE_BYTES = 1 << 20
_POLL_S = 0.1
# The gateway looks at a service that was not there at first every second or two.
_SEEN_TIMEOUT_S = 5.0
_RESTART_FIRST_S, _RESTART_MAX_S = 0.5, 30.0
# Restarts in a row, each of a process that did not live for _RESTART_MAX_S, after which a vital service is given up.
_MAX_VITAL_RESTARTS = 5

LogSink = Callable[[str, str], None]


class ServiceFailedError(EasyspecError):
    """A service ended, or did not become healthy."""


@dataclass(frozen=True)
class StackSettings:
    """Which services to start, and how.

    `base` and `draft` are checkpoint folders or GGUF files; without `draft` there is no drafter, unless it
    `drafts_from_text` alone. `served_model_name` is what requests call the base, by default the last part of its path.
    A port 0 takes a free one. Of `num_verifiers` the first listens on `verifier_address`, the others on free ports.
    `also` are further base models by the names that requests use, each with a verifier on a free port; the drafter
    serves them too. `flags` are further flags by role (`{"drafter": ["--layer-parallel-size", "4"]}`), `commands`
    replaces what follows the Python interpreter for a role; a role with more than one of `num_ranks` runs under
    torchrun. `ready_timeout_s` bounds loading, `stop_grace_s` draining.
    """

    base: Path = DEFAULT_BASE
    draft: Path | None = DEFAULT_DRAFT
    drafts_from_text: bool = False
    served_model_name: str | None = None
    gateway_address: str = FREE_PORT
    verifier_address: str = FREE_PORT
    drafter_address: str = FREE_PORT
    http_address: str = HTTP_OFF
    num_verifiers: int = 1
    also: Mapping[str, Path] = field(default_factory=dict)
    flags: Mapping[str, Sequence[str]] = field(default_factory=dict)
    commands: Mapping[str, Sequence[str]] = field(default_factory=dict)
    num_ranks: Mapping[str, int] = field(default_factory=dict)
    ready_timeout_s: float = 300.0
    stop_grace_s: float = 10.0

    @property
    def num_bytes(self) -> int:
        paths = [self.base, *self.also.values(), *([self.draft] if self.draft is not None else [])]
        return sum(weight_bytes(path) for path in paths)

    @property
    def has_tls(self) -> bool:
        return "--tls-certificate" in self.flags.get(GATEWAY, ())

    def check(self) -> None:
        """Raise ConfigurationError for a folder that is not a checkpoint, and for a pair of different vocabularies."""
        for name, folder in (("base", self.base), ("draft", self.draft), *self.also.items()):
            if folder is not None and not (is_gguf(folder) or (folder / "config.json").is_file()):
                raise ConfigurationError(
                    f"{name} is {str(folder)!r}; allowed: a checkpoint folder with a config.json, or a GGUF file"
                )
        if self.draft is not None:
            check_vocabularies(self.base, self.draft)

    @property
    def undrafted(self) -> Mapping[str, Path]:
        """The models of `also` that the base's drafter cannot guess for: their token ids mean something else."""
        fingerprint = tokenizer_fingerprint(self.base)
        return {name: path for name, path in self.also.items() if tokenizer_fingerprint(path) != fingerprint}


class ServiceProcess:
    """One child process with a health service at `address`. Its output goes line by line to `on_log(role, line)`, or
    behind what is in the file `output`.

    The verifier of a further model has its name behind its role: "verifier NAME".
    """

    def __init__(
        self, role: str, arguments: Sequence[str], address: str, on_log: LogSink, output: Path | None = None
    ) -> None:
        self.role = role
        self.address = address
        self._arguments = tuple(arguments)
        self._on_log = on_log
        self._output = output
        self._process: asyncio.subprocess.Process | None = None
        self._pump: asyncio.Task[None] | None = None
        self._readiness: ReadinessSocket | None = None
        self._last_lines: collections.deque[str] = collections.deque(maxlen=_NUM_KEPT_LINES)

    @property
    def pid(self) -> int:
        """Process id; valid after `start`."""
        assert self._process is not None, "start comes first"
        return self._process.pid

    @property
    def is_running(self) -> bool:
        return self._process is not None and self._process.returncode is None

    async def start(self) -> None:
        self._close_readiness()
        self._readiness = readiness = ReadinessSocket()
        python_path = os.pathsep.join([str(CHECKOUT), *filter(None, [os.environ.get("PYTHONPATH")])])
        with contextlib.ExitStack() as files:
            output = asyncio.subprocess.PIPE
            if self._output is not None:
                output = files.enter_context(self._output.open("ab")).fileno()
            self._process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "easyspec.cli.child",
                str(os.getpid()),
                *self._arguments,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=output,
                stderr=asyncio.subprocess.STDOUT,
                env={**os.environ, "PYTHONPATH": python_path, "PYTHONUNBUFFERED": "1", **readiness.environment},
                limit=_MAX_LINE_BYTES,
                process_group=0,  # Ctrl-C in the terminal reaches us alone; we drain the children in order
            )
        if self._output is None:
            self._pump = asyncio.create_task(self._pump_log(self._process))

    async def wait_serving(self, timeout_s: float) -> None:
        """Return when healthy; ServiceFailedError if the process ends first or `timeout_s` seconds pass.

        The process itself must say so: at the address, a service of another program may answer.
        """
        assert self._readiness is not None, "start comes first"
        deadline = time.monotonic() + timeout_s
        while not self._readiness.is_ready:
            if not self.is_running:
                raise await self.failure("before it was ready")
            if time.monotonic() > deadline:
                raise ServiceFailedError(f"the {self.role} at {self.address} was not ready after {timeout_s:g} s")
            await asyncio.sleep(_POLL_S)

    async def wait(self) -> None:
        if self._process is not None:
            await self._process.wait()

    async def failure(self, when: str) -> ServiceFailedError:
        """What to say about a process that ended: exit code, and its last words."""
        assert self._process is not None
        code = await self._process.wait()
        if self._pump is not None:
            await self._pump
        ending = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        # Why the role says that it ended, whatever a launcher says after it; else the last line.
        own_lines = [line for line in self._last_lines if line.startswith(f"{self.role}: ")]
        lines = own_lines or self._last_lines or ["it said nothing"]
        words = lines[-1] if self._output is None else f"see {self._output}"
        return ServiceFailedError(f"the {self.role} {ending} {when}: {words}")

    def kill(self) -> None:
        self._signal(signal.SIGKILL)

    async def stop(self, grace_s: float) -> None:
        """SIGTERM, and SIGKILL after `grace_s` seconds; returns when the process is gone. Idempotent."""
        if self._process is None:
            return
        self._signal(signal.SIGTERM)
        try:
            async with asyncio.timeout(grace_s):
                await self._process.wait()
        except TimeoutError:
            self._signal(signal.SIGKILL)
            await self._process.wait()
        if self._pump is not None:
            await self._pump
        self._close_readiness()

    def _close_readiness(self) -> None:
        if self._readiness is not None:
            self._readiness.close()
            self._readiness = None

    def _signal(self, number: signal.Signals) -> None:
        if self._process is not None and self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(number)

    async def _pump_log(self, process: asyncio.subprocess.Process) -> None:
        assert process.stdout is not None
        while True:
            try:
                raw = await process.stdout.readline()
            except ValueError:  # a line beyond the limit; the stream goes on after it
                continue
            if not raw:
                return
            line = raw.decode("utf-8", errors="replace").rstrip("\n")
            if line.strip():
                self._last_lines.append(line)
            self._on_log(self.role, line)


class ServiceStack:
    """Verifier, drafter (if there is a draft model) and gateway; `async with` starts, waits until healthy and stops.

    Raises ConfigurationError for folders that are not checkpoints and ServiceFailedError if a service does not come
    up; whatever was started is stopped again.
    """

    def __init__(
        self, settings: StackSettings, on_log: LogSink, say: Callable[[str], None] = lambda _text: None
    ) -> None:
        """`say` is told what is being loaded, and when each service is ready."""
        settings.check()
        self._settings = settings
        self._on_log = on_log
        self._say = say
        addresses = [settings.verifier_address, *[FREE_PORT] * (settings.num_verifiers - 1)]
        model = ["--model", str(settings.base)]
        if settings.served_model_name is not None:
            model += ["--served-model-name", settings.served_model_name]
        self.verifiers = tuple(self._process(VERIFIER, address, model) for address in addresses)
        verifier_addresses = ",".join(verifier.address for verifier in self.verifiers)
        wiring = ["--tokenizer", str(settings.base), "--verifier-address", verifier_addresses]
        self.drafter: ServiceProcess | None = None
        if settings.draft is not None or settings.drafts_from_text:
            arguments = ["--tokenizer", str(settings.base)]
            if settings.draft is not None:
                arguments += ["--model", str(settings.draft)]
                notes = [check_vocabularies(settings.base, settings.draft)]
                notes += [padding_note(base, settings.draft) for base in (settings.base, *settings.also.values())]
                for note in filter(None, notes):
                    on_log(DRAFTER, note)
            elif "--sources" not in settings.flags.get(DRAFTER, ()):
                arguments += ["--sources", TEXT_SOURCES]
            self.drafter = self._process(DRAFTER, settings.drafter_address, arguments)
            wiring += ["--drafter-address", self.drafter.address]
        self.also = {
            name: self._process(VERIFIER, FREE_PORT, ["--model", str(base), "--served-model-name", name], name)
            for name, base in settings.also.items()
        }
        if self.also:
            further = {
                name: {"verifier_address": process.address, "tokenizer": str(settings.also[name])}
                | ({"drafter_address": NO_DRAFTER} if name in settings.undrafted else {})
                for name, process in self.also.items()
            }
            wiring += ["--further-models", json.dumps(further)]
        is_http_on = settings.http_address != HTTP_OFF
        self.http_address = _with_port(settings.http_address) if is_http_on else None
        wiring += ["--http-address", self.http_address or HTTP_OFF]
        self.gateway = self._process(GATEWAY, settings.gateway_address, wiring)

    @property
    def verifier(self) -> ServiceProcess:
        return self.verifiers[0]

    @property
    def gateway_address(self) -> str:
        return self.gateway.address

    @property
    def processes(self) -> tuple[ServiceProcess, ...]:
        return (*self._roles, self.gateway)

    @property
    def _roles(self) -> tuple[ServiceProcess, ...]:
        verifiers = (*self.verifiers, *self.also.values())
        return verifiers if self.drafter is None else (*verifiers, self.drafter)

    async def __aenter__(self) -> Self:

        async def wait_ready(process: ServiceProcess) -> None:
            started_s = time.monotonic()
            await process.wait_serving(self._settings.ready_timeout_s)
            self._say(f"{process.role} ready after {time.monotonic() - started_s:.1f} s")

        try:
            roles = ", ".join(process.role for process in self.processes)
            self._say(f"loading {self._settings.base.name} ({self._settings.num_bytes / 2**20:,.0f} MiB): {roles}")
            for process in self.processes:
                await process.start()
            await _all(wait_ready(process) for process in self.processes)
            if (self.drafter is not None or self.also) and not self._settings.has_tls:
                # The first request should have all models; the gateway works without some, so a timeout is no failure.
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(_SEEN_TIMEOUT_S):
                        while not await are_peers_ready(self.gateway.address, has_drafter=self.drafter is not None):  # noqa: ASYNC110
                            await asyncio.sleep(_POLL_S)
        except BaseException:
            await self.stop()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    async def stop(self) -> None:
        """Drain the gateway, then the services behind it; also when the caller is being cancelled."""

        async def stop_all() -> None:
            await self.gateway.stop(self._settings.stop_grace_s)
            await asyncio.gather(*(process.stop(self._settings.stop_grace_s) for process in self._roles))

        stopping, is_cancelled = asyncio.ensure_future(stop_all()), False
        while not stopping.done():
            try:
                await asyncio.shield(stopping)
            except asyncio.CancelledError:  # comes after
                is_cancelled = True
        stopping.result()
        if is_cancelled:
            raise asyncio.CancelledError

    async def watch(self) -> None:
        """Restart verifiers and drafter whenever they end; raises ServiceFailedError for the gateway, and for a
        verifier of the first model that does not stay up however often it is started."""

        async def watch_gateway() -> None:
            await self.gateway.wait()
            raise await self.gateway.failure("while serving")

        watches: list[Awaitable[None]] = [watch_gateway()]
        watches += [self._keep(verifier, _MAX_VITAL_RESTARTS) for verifier in self.verifiers]
        # Others go on without these.
        spared = [*self.also.values(), *([self.drafter] if self.drafter is not None else [])]
        watches += [self._keep(process, max_restarts=None) for process in spared]
        await _all(watches)

    async def _keep(self, process: ServiceProcess, max_restarts: int | None) -> None:
        pause_s, num_restarts = _RESTART_FIRST_S, 0
        while True:
            started_s = time.monotonic()
            await process.wait()
            if time.monotonic() - started_s > _RESTART_MAX_S:
                pause_s, num_restarts = _RESTART_FIRST_S, 0
            if num_restarts == max_restarts:
                raise await process.failure(f"after {num_restarts} restarts")
            await asyncio.sleep(pause_s)
            pause_s, num_restarts = min(2 * pause_s, _RESTART_MAX_S), num_restarts + 1
            await process.start()

    def _process(self, role: str, address: str, arguments: Sequence[str], model: str = "") -> ServiceProcess:
        address = _with_port(address)
        module = role if role == GATEWAY else f"{role}_service"
        launcher = torchrun_arguments(self._settings.num_ranks.get(role, 1))
        command = self._settings.commands.get(role, (*launcher, "-m", module))
        whole = [*command, "--address", address, *arguments, *self._settings.flags.get(role, ())]
        return ServiceProcess(f"{role} {model}".rstrip(), whole, address, self._on_log)


def _with_port(address: str) -> str:
    """The address, a port 0 replaced by one that is free at present."""
    host, _, port = address.rpartition(":")
    return f"{host}:{free_port(host)}" if port == "0" else address


async def _all(waits: collections.abc.Iterable[Awaitable[None]]) -> None:
    """Await all; the first error ends the others."""
    tasks = [asyncio.ensure_future(wait) for wait in waits]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
