from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from easyspec.cli.chat import ChatTerminal
from easyspec.cli.chat_commands import CommandError, Conversation, obey
from easyspec.cli.clients import GenerateFlags, Turn
from easyspec.errors import PromptTooLongError
from easyspec.v1 import generation_pb2
from tests.cli.conftest import CHECKOUT
from tests.cli.terminal import CTRL_C, CTRL_D, at_terminal
from tests.fakes.scripted_gateway import ScriptedGateway, serve_scripted_gateway

TEXTS = {1: "Good", 2: " day", 3: ",", 4: " friend", 5: "."}
ROUNDS = [[1], [2, 3], [4, 5]]
ANSWER = "Good day, friend."
GREEN, YELLOW = "\x1b[32m", "\x1b[1;33m"


@pytest.fixture
async def served() -> AsyncIterator[tuple[ScriptedGateway, str]]:
    async with serve_scripted_gateway(ROUNDS) as (gateway, address):
        gateway.token_texts = TEXTS
        yield gateway, address


def messages(request: generation_pb2.GenerateRequest) -> list[tuple[str, str]]:
    return [(message.role, message.content) for message in request.chat.messages]


async def chat(lines: bytes, *flags: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a conversation through pipes."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *("-m", "easyspec.cli.main", "chat", *flags),
        cwd=CHECKOUT,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env=os.environ | {"COLUMNS": "120"},
    )
    out, err = await process.communicate(lines)
    assert process.returncode is not None
    return process.returncode, out.decode(), err.decode()


# --- through pipes ----------------------------------------------------------------------------------------------


async def test_lines_in_answers_out_and_nothing_else(served: tuple[ScriptedGateway, str]) -> None:
    gateway, address = served
    flags = ("--gateway", address, "--system", "Be brief.", "--temperature", "0.5", "--max-tokens", "9")
    code, out, err = await chat(b"Hello?\n\nHow are \\\nyou?", *flags)
    assert (code, out) == (0, f"{ANSWER}\n{ANSWER}\n"), err
    first, second = gateway.requests
    assert messages(first) == [("system", "Be brief."), ("user", "Hello?")]
    assert messages(second) == [*messages(first), ("assistant", ANSWER), ("user", "How are \nyou?")]
    assert (first.sampling.temperature, first.stop.max_tokens) == (0.5, 9)
    assert not first.sampling.HasField("seed")


async def test_commands_between_the_lines(served: tuple[ScriptedGateway, str], tmp_path: Path) -> None:
    gateway, address = served
    file = tmp_path / "talk.json"
    lines = f"one\n/stats\n/save {file}\n/reset\n/seed 7\n/system Be kind.\n//two\n/quit\nthree\n"
    code, out, err = await chat(lines.encode(), "--gateway", address)
    assert (code, out) == (0, f"{ANSWER}\n{ANSWER}\n"), err
    assert "acceptance by level" in err
    assert json.loads(file.read_text()) == {
        "messages": [{"role": "user", "content": "one"}, {"role": "assistant", "content": ANSWER}]
    }
    assert messages(gateway.requests[1]) == [("system", "Be kind."), ("user", "/two")]
    assert gateway.requests[1].sampling.seed == 7


async def test_a_refused_message_ends_a_pipe_with_its_reason(served: tuple[ScriptedGateway, str]) -> None:
    gateway, address = served
    gateway.error = PromptTooLongError("prompt", "9000 tokens", "at most 8191 tokens")
    code, out, err = await chat(b"one\ntwo\n", "--gateway", address)
    assert (code, out) == (2, "")
    assert "prompt is '9000 tokens'" in err
    assert len(gateway.requests) == 1


async def test_bytes_that_are_no_text_are_replaced(served: tuple[ScriptedGateway, str]) -> None:
    gateway, address = served
    code, _, err = await chat(b"caf\xe9\n", "--gateway", address)
    assert code == 0, err
    assert messages(gateway.requests[0]) == [("user", "caf\ufffd")]


async def test_no_gateway_is_one_line_and_exit_code_1() -> None:
    code, out, err = await chat(b"one\n", "--gateway", "127.0.0.1:1")
    assert (code, out) == (1, "")
    assert err.count("\n") == 1
    assert "127.0.0.1:1" in err


# --- at a terminal ----------------------------------------------------------------------------------------------


async def test_a_conversation_at_a_terminal(served: tuple[ScriptedGateway, str]) -> None:
    _, address = served
    async with at_terminal("chat", "--gateway", address) as terminal:
        await terminal.expect("> ")
        terminal.type("Hello?\n")
        await terminal.expect(ANSWER)
        assert f"{GREEN} day" in terminal.shown
        assert f"{YELLOW}," in terminal.shown
        await terminal.expect("> ", 2)
        terminal.type("/warp\n")
        await terminal.expect("unknown command /warp")
        await terminal.expect("> ", 3)
        terminal.type(CTRL_D)
        assert await terminal.ended() == 0


async def test_ctrl_c_ends_the_answer_and_not_the_program(served: tuple[ScriptedGateway, str]) -> None:
    gateway, address = served
    gateway.gate.clear()
    async with at_terminal("chat", "--gateway", address) as terminal:
        await terminal.expect("> ")
        terminal.type("Hello?\n")
        await terminal.expect("Good")
        terminal.type(CTRL_C)
        await terminal.expect("Stopped.")
        await terminal.expect("> ", 2)
        async with asyncio.timeout(5):
            while not gateway.num_cancelled:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        gateway.gate.set()
        terminal.type("half a line")
        await terminal.expect("half a line")
        await terminal.press_until(CTRL_C, "> ", 3)
        terminal.type("Go on.\n")
        await terminal.expect(ANSWER)
        await terminal.expect("> ", 4)
        terminal.type(CTRL_D)
        assert await terminal.ended() == 0
    # What had come of the stopped answer belongs to the conversation; the dropped line does not.
    assert messages(gateway.requests[1]) == [("user", "Hello?"), ("assistant", "Good"), ("user", "Go on.")]


async def test_an_error_is_told_and_the_conversation_goes_on(served: tuple[ScriptedGateway, str]) -> None:
    gateway, address = served
    gateway.error = PromptTooLongError("prompt", "9000 tokens", "at most 8191 tokens")
    async with at_terminal("chat", "--gateway", address) as terminal:
        await terminal.expect("> ")
        terminal.type("Hello?\n")
        await terminal.expect("prompt is '9000 tokens'")
        gateway.error = None
        terminal.type("Again.\n")
        await terminal.expect(ANSWER)
        await terminal.expect("> ", 3)
        terminal.type(CTRL_D)
        assert await terminal.ended() == 0
    assert messages(gateway.requests[1]) == [("user", "Again.")]


async def test_a_models_text_cannot_command_the_terminal(served: tuple[ScriptedGateway, str]) -> None:
    gateway, address = served
    gateway.token_texts = TEXTS | {3: "\x1b]0;pwned\x07"}
    async with at_terminal("chat", "--gateway", address, "--no-show-speculation") as terminal:
        await terminal.expect("> ")
        terminal.type("Hello?\n")
        await terminal.expect("friend.")
        assert "\x1b]" not in terminal.shown


async def test_sigterm_at_the_prompt_ends_the_program(served: tuple[ScriptedGateway, str]) -> None:
    async with at_terminal("chat", "--gateway", served[1]) as terminal:
        await terminal.expect("> ")
        async with asyncio.timeout(20):
            while terminal.process.returncode is None:
                terminal.process.send_signal(signal.SIGTERM)
                await asyncio.wait([asyncio.ensure_future(terminal.ended())], timeout=1)
        assert terminal.process.returncode == 128 + signal.SIGTERM


# --- commands ---------------------------------------------------------------------------------------------------


@pytest.fixture
def conversation() -> Conversation:
    return Conversation(GenerateFlags(""), "Be brief.", [Turn("user", "a"), Turn("assistant", "b")])


def test_reset_keeps_the_system_prompt(conversation: Conversation) -> None:
    assert isinstance(obey("/reset", conversation), str)
    assert conversation.messages == (Turn("system", "Be brief."),)


def test_system_without_text_takes_it_away(conversation: Conversation) -> None:
    obey("/system", conversation)
    assert conversation.messages[0] == Turn("user", "a")


def test_seed_is_set_and_taken_back(conversation: Conversation) -> None:
    obey("/seed 12", conversation)
    assert conversation.request("x").sampling.seed == 12
    obey("/seed", conversation)
    assert conversation.request("x").sampling.seed is None


def test_quit_leaves_and_help_names_every_command(conversation: Conversation) -> None:
    assert obey("/quit", conversation) is None
    outcome = obey("/help", conversation)
    assert isinstance(outcome, str)
    assert all(name in outcome for name in ("/reset", "/system", "/seed", "/stats", "/save", "/quit"))


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("/nonsense", "unknown command"),
        ("/seed x", "seed is 'x'"),
        (f"/seed {2**64}", "allowed: 0 to"),
        ("/stats", "no answer yet"),
        ("/save", "name a file"),
        ("/save /no/such/folder/x", "cannot be written: No such file"),
        ("/save {existing}", "exists already"),
    ],
)
def test_a_command_that_cannot_be_done_says_why(
    conversation: Conversation, tmp_path: Path, line: str, why: str
) -> None:
    existing = tmp_path / "existing"
    existing.write_text("mine")
    with pytest.raises(CommandError, match=why):
        obey(line.format(existing=existing), conversation)
    assert existing.read_text() == "mine"


def test_thinking_is_dim_and_only_where_there_are_colours(capsys: pytest.CaptureFixture[str]) -> None:
    rounds = [generation_pb2.GenerateResponse(reasoning="hm"), generation_pb2.GenerateResponse(text="yes")]
    for is_coloured in (False, True):
        terminal = ChatTerminal(is_interactive=False, is_coloured=is_coloured)
        for response in rounds:
            terminal.write(response, ends_thinking=bool(response.text))
    plain, coloured = capsys.readouterr().out.split("yes", 1)
    assert plain == ""
    assert "\x1b[2mhm" in coloured
    assert coloured.index("hm") < coloured.index("\n\n") < coloured.index("yes")
