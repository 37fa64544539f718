"""`easyspec up`: all services in one terminal."""

from __future__ import annotations

import signal
import sys
from collections.abc import Mapping
from types import MappingProxyType

from rich.console import Console
from rich.text import Text

from easyspec.cli.clients import verifier_info
from easyspec.cli.processes import DRAFTER, GATEWAY, VERIFIER, ServiceStack, StackSettings
from easyspec.ops.native_library import widens_bfloat16

_ROLE_STYLES: Mapping[str, str] = MappingProxyType({VERIFIER: "cyan", DRAFTER: "magenta", GATEWAY: "green"})


class _FailingConsole(Console):
    """rich's own leaves the program on the spot where its output is gone, and the services behind."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


class RoleLog:
    """Writes the services' log lines to stderr, each behind its role in the role's colour.

    Where stderr is gone (its reader has ended, the terminal is closed) this process is told to end, once.
    """

    def __init__(self) -> None:
        self._console: Console | None = _FailingConsole(stderr=True, highlight=False, soft_wrap=True)

    def __call__(self, role: str, line: str) -> None:
        if self._console is None:
            return
        prefix = Text(f"{role:<8} | ", style=_ROLE_STYLES.get(role.partition(" ")[0], "white"))
        try:
            self._console.print(prefix + Text.from_ansi(line))
        except OSError:
            self._console = None
            signal.raise_signal(signal.SIGTERM)


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


async def serve_until_cancelled(settings: StackSettings) -> None:
    """Start the services, say what is served where, restart a lost verifier or drafter; raises ServiceFailedError."""
    async with ServiceStack(settings, RoleLog(), say) as stack:
        drafting = f"drafter {stack.drafter.address}" if stack.drafter is not None else "no drafter"
        rest = f", REST http://{stack.http_address}" if stack.http_address is not None else ""
        addresses = " ".join(verifier.address for verifier in stack.verifiers)
        verifying = f"verifier{'s' if len(stack.verifiers) > 1 else ''} {addresses}"
        further = "".join(f", {name} {process.address}" for name, process in stack.also.items())
        say(f"ready: gateway {stack.gateway_address}, {verifying}{further}, {drafting}{rest}")
        say(await _banner(settings, stack))
        await stack.watch()


async def _banner(settings: StackSettings, stack: ServiceStack) -> str:
    info = await verifier_info(stack.verifier.address)
    if settings.draft is not None:
        guesses = f"by {settings.draft.name}, and from the text itself"
    else:
        guesses = "from the text itself" if settings.drafts_from_text else "none: plain decoding"
    lines = [
        f"model      {info.model.name}, {info.model.dtype}, {info.model.max_model_len} tokens of context, "
        f"{info.kv.num_slots} tokens of KV memory",
        f"computes   {_computation(info.model.executor, info.model.weight_format, info.model.dtype)}",
        f"guesses    {guesses}",
    ]
    if stack.http_address is not None:
        scheme = "https" if settings.has_tls else "http"
        lines += [f"base URL   {scheme}://{stack.http_address}/v1", f"playground {scheme}://{stack.http_address}/"]
    return "\n".join(f"  {line}" for line in lines)


def _computation(executor: str, weight_format: str, dtype: str) -> str:
    """What computes the model, on which weights, and in which type where that is not the model's own."""
    said = f"{executor}, {weight_format} weights"
    if dtype == "bfloat16" and widens_bfloat16(executor):
        return f"{said}; products in float32, as this processor multiplies no bfloat16"
    return said
