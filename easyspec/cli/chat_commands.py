"""A conversation and its slash commands; no terminal and no network here."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path

from rich.table import Table

from easyspec.cli.clients import GenerateFlags, GenerateResponse, Turn
from easyspec.cli.generate import statistics_table
from easyspec.errors import EasyspecError
from easyspec.speculation.parameters import MAX_SEED

HELP = """\
/reset          forget the conversation, keep the system prompt
/system TEXT    set the system prompt; without TEXT take it away
/seed N         answer with this seed; without N draw a new one each time
/stats          what speculation did for the last answer
/save FILE      write the conversation as JSON, in the shape OpenAI's API takes
/help           this list
/quit           leave; Ctrl-D does the same
A line that ends with \\ goes on in the next. Begin with // to send a line that begins with /.
Ctrl-C stops an answer."""


class CommandError(EasyspecError):
    """A slash command that cannot be done; the message says why."""


@dataclass
class Conversation:
    """What was said, and how to ask for more. `last_rounds` is the latest answer, round by round."""

    flags: GenerateFlags
    system_prompt: str | None = None
    turns: list[Turn] = field(default_factory=list)
    last_rounds: list[GenerateResponse] = field(default_factory=list)

    @property
    def messages(self) -> tuple[Turn, ...]:
        """Everything said so far, the system prompt first."""
        system = () if self.system_prompt is None else (Turn("system", self.system_prompt),)
        return (*system, *self.turns)

    def request(self, message: str) -> GenerateFlags:
        return replace(self.flags, prompt=message, is_chat=True, earlier_turns=self.messages)

    def add(self, message: str, answer: str) -> None:
        self.turns += [Turn("user", message), Turn("assistant", answer)]


def obey(line: str, conversation: Conversation) -> str | Table | None:
    """Do what a line that begins with a slash says; returns what to show, None to end the conversation.

    Raises CommandError.
    """
    name, _, argument = line.partition(" ")
    argument = argument.strip()
    match name:
        case "/help":
            return HELP
        case "/quit" | "/exit":
            return None
        case "/reset":
            conversation.turns.clear()
            return "The conversation begins anew."
        case "/system":
            conversation.system_prompt = argument or None
            return "The system prompt is set." if argument else "No system prompt."
        case "/seed":
            if argument and not (argument.isdecimal() and int(argument) <= MAX_SEED):
                raise CommandError(f"seed is {argument!r}; allowed: 0 to {MAX_SEED}, or nothing")
            seed = int(argument) if argument else None
            conversation.flags = replace(conversation.flags, sampling=replace(conversation.flags.sampling, seed=seed))
            return "A new seed for every answer." if seed is None else f"Answers use seed {seed}."
        case "/stats":
            if not (rounds := conversation.last_rounds):
                raise CommandError("no answer yet")
            if not rounds[-1].HasField("completion"):
                raise CommandError("the last answer was stopped before its statistics came")
            return statistics_table(rounds, rounds[-1].completion)
        case "/save":
            return _save(argument, conversation)
    raise CommandError(f"unknown command {name}; /help lists the commands")


def _save(argument: str, conversation: Conversation) -> str:
    if not argument:
        raise CommandError("name a file: /save FILE")
    messages = [{"role": turn.role, "content": turn.content} for turn in conversation.messages]
    content = json.dumps({"messages": messages}, ensure_ascii=False, indent=2) + "\n"
    path = Path(argument).expanduser()
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(content)
    except FileExistsError:
        raise CommandError(f"{path} exists already; name another file") from None
    except (OSError, ValueError) as error:
        raise CommandError(f"{path} cannot be written: {getattr(error, 'strerror', None) or error}") from error
    return f"{len(messages)} messages written to {path}."
