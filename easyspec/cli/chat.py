"""`easyspec chat`: a conversation in the terminal, or through pipes."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from contextlib import AsyncExitStack, aclosing
from dataclasses import dataclass
from typing import Any, NoReturn

from rich.console import Console
from rich.style import Style

from easyspec.cli.chat_commands import Conversation, obey
from easyspec.cli.clients import GatewayAccess, GatewayClient, GenerateFlags, GenerateResponse
from easyspec.cli.event_loop import END_SIGNALS, EventLoopThread, handled_signals
from easyspec.cli.generate import coloured
from easyspec.cli.processes import LogSink, ServiceStack, StackSettings
from easyspec.cli.up import say
from easyspec.errors import EasyspecError

_PROMPT, _CONTINUATION = "> ", ". "
_THOUGHT_STYLE = Style(dim=True)
# A model's text may hold anything; a terminal must not take it for commands. Newline and tab are text.
_CONTROLS = {code: "\ufffd" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}


@dataclass(frozen=True)
class ChatTerminal:
    """How to talk: `is_interactive` prompts and goes on after errors, `is_coloured` marks guesses and bonus tokens.

    Answers go to stdout, everything else to stderr.
    """

    is_interactive: bool
    is_coloured: bool

    def say(self, text: str) -> None:
        Console(stderr=True, highlight=False, markup=False, soft_wrap=True).print(text, style="dim")

    def write(self, response: GenerateResponse, ends_thinking: bool) -> None:
        """Show a round of the answer; of thinking before it only where colours tell it apart."""
        shown = response
        if sys.stdout.isatty():
            shown = GenerateResponse()
            shown.CopyFrom(response)
            shown.text = response.text.translate(_CONTROLS)
            shown.reasoning = response.reasoning.translate(_CONTROLS)
            shown.token_texts[:] = [text.translate(_CONTROLS) for text in response.token_texts]
        text = shown.text
        if self.is_coloured:
            thought = _THOUGHT_STYLE.render(shown.reasoning) if shown.reasoning else ""
            text = thought + ("\n\n" if ends_thinking else "") + coloured(shown)
        print(text, end="", flush=True)

    def lines(self) -> Iterator[str]:
        """What is typed, until its end; Ctrl-C at the prompt drops the line."""
        sys.stdin.reconfigure(errors="replace")  # type: ignore[union-attr]
        if not self.is_interactive:
            yield from _joined(lambda _: sys.stdin.readline(), is_interactive=False)
            return
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  makes input() edit lines and remember them
        yield from _joined(_ask, is_interactive=True)


def hold_chat(
    gateway_address: str | None,
    settings: StackSettings,
    flags: GenerateFlags,
    system_prompt: str | None,
    terminal: ChatTerminal,
    on_log: LogSink,
    access: GatewayAccess,
) -> None:
    """Converse until the input ends, with the gateway at the address or with services of our own.

    Raises EasyspecError: at the start, and where input does not come from a terminal also later.
    """
    stack = AsyncExitStack()

    async def open_client() -> GatewayClient:
        address = gateway_address
        if address is None:
            address = (await stack.enter_async_context(ServiceStack(settings, on_log, say))).gateway_address
        client = await stack.enter_async_context(GatewayClient(address, access))
        await client.info()
        return client

    def leave(number: int, _frame: Any) -> NoReturn:
        """SIGTERM and a closed terminal end the program as an exception does, so that services are stopped."""
        raise SystemExit(128 + number)

    with EventLoopThread() as loop, handled_signals(leave, END_SIGNALS):
        try:
            _converse(loop, loop.run(open_client()), Conversation(flags, system_prompt), terminal)
        finally:
            loop.run(stack.aclose())


def _converse(loop: EventLoopThread, client: GatewayClient, conversation: Conversation, terminal: ChatTerminal) -> None:
    if terminal.is_interactive:
        terminal.say("/help lists what you can do; Ctrl-D leaves.")
    for line in terminal.lines():
        try:
            if line.startswith("/") and not line.startswith("//"):
                outcome = obey(line.rstrip(), conversation)
                if outcome is None:
                    return
                if isinstance(outcome, str):
                    terminal.say(outcome)
                else:
                    Console(stderr=True).print(outcome)
            elif line.strip():
                _answer(line.removeprefix("/"), loop, client, conversation, terminal)
        except EasyspecError as error:
            if not terminal.is_interactive:
                raise
            terminal.say(str(error))


def _answer(
    message: str, loop: EventLoopThread, client: GatewayClient, conversation: Conversation, terminal: ChatTerminal
) -> None:
    """Stream an answer. One that Ctrl-C stops is remembered as far as it came; a failed one is not."""
    rounds: list[GenerateResponse] = []
    is_stopped = False
    try:
        loop.run(_stream(client, conversation.request(message), rounds, terminal))
    except KeyboardInterrupt:
        is_stopped = True
    finally:
        print(end="\n" if rounds else "", flush=True)
    answer = "".join(response.text for response in rounds)
    conversation.last_rounds = rounds
    if answer or not is_stopped:
        conversation.add(message, answer)
    if is_stopped:
        terminal.say("Stopped.")
        if not terminal.is_interactive:
            raise KeyboardInterrupt
    elif terminal.is_interactive:
        terminal.say(_summary(rounds))


async def _stream(
    client: GatewayClient, flags: GenerateFlags, rounds: list[GenerateResponse], terminal: ChatTerminal
) -> None:
    async with aclosing(client.generate(flags)) as responses:
        async for response in responses:
            has_thought = any(one.reasoning for one in (*rounds, response))
            is_first = bool(response.text) and not any(one.text for one in rounds)
            terminal.write(response, ends_thinking=has_thought and is_first)
            rounds.append(response)


def _summary(rounds: list[GenerateResponse]) -> str:
    """One line: size, speed, and how much of it was guessed."""
    if not rounds:
        return "No answer."
    completion = rounds[-1].completion
    statistics, num_tokens = completion.speculation, completion.usage.num_output_tokens
    parts = [f"{num_tokens} tokens"]
    if statistics.total_ns:
        parts.append(f"{(num_tokens - len(rounds[0].token_ids)) * 1e9 / statistics.total_ns:.0f} tokens/s")
    if statistics.num_draft_rounds:
        parts.append(f"{statistics.mean_acceptance_length:.2f} tokens per round")
    return ", ".join([*parts, f"seed {completion.seed}"])


def _joined(read: Callable[[str], str], is_interactive: bool) -> Iterator[str]:
    """Lines, each ending in a backslash joined with the next; the end of input is an empty string from `read`."""
    parts: list[str] = []
    while True:
        try:
            raw = read(_CONTINUATION if parts else _PROMPT)
        except KeyboardInterrupt:
            if not is_interactive:
                raise
            sys.stderr.write("\n")
            parts = []
            continue
        line = raw.removesuffix("\n")
        parts += [line.removesuffix("\\")] if raw else []
        if parts and not line.endswith("\\"):
            yield "\n".join(parts)
            parts = []
        if not raw:
            return


def _ask(prompt: str) -> str:
    if not sys.stdout.isatty():  # stdout is a file of answers
        print(prompt, end="", file=sys.stderr, flush=True)
        return sys.stdin.readline()
    try:
        return input(prompt) + "\n"
    except EOFError:
        return ""
