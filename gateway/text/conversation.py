"""A conversation, the tools it may use, and how a chat template sees them."""

from __future__ import annotations

import enum
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from easyspec.errors import InvalidRequestError

CHAT_ROLES = ("system", "developer", "user", "assistant", "tool")
MAX_TOOLS = 128


@dataclass(frozen=True)
class ToolCall:
    """A call the assistant has made; `arguments` is what it wrote, which should be a JSON object."""

    id: str
    name: str
    arguments: str


@dataclass(frozen=True)
class ChatTurn:
    """One message of a conversation. `tool_calls` and `reasoning` are an assistant's, `tool_call_id` is a tool's answer
    to a call."""

    role: str
    content: str
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str = ""
    name: str = ""
    reasoning: str = ""


@dataclass(frozen=True)
class ToolDefinition:
    """A function that may be called; `parameters` is the JSON Schema of its arguments, as text ("": none). `is_strict`:
    its forced calls must be valid by every keyword of the schema."""

    name: str
    description: str = ""
    parameters: str = ""
    is_strict: bool = False

    @property
    def told(self) -> dict[str, Any]:
        """As models are told of it."""
        return {"name": self.name, "description": self.description, "parameters": self.schema}

    @property
    def schema(self) -> dict[str, Any]:
        """The JSON Schema of the arguments; InvalidRequestError if it is none."""
        schema = parsed_json(self.parameters) if self.parameters else {"type": "object", "properties": {}}
        if not isinstance(schema, dict):
            raise InvalidRequestError(f"tools[{self.name}].parameters", self.parameters, "a JSON Schema object")
        return schema


class ToolMode(enum.Enum):
    """Whether tools are called; NAMED is REQUIRED with one function."""

    AUTO = "auto"
    NONE = "none"
    REQUIRED = "required"
    NAMED = "named"


@dataclass(frozen=True)
class Tools:
    """What may be called, and whether it must be. `name` goes with NAMED; `allowed` are the names that this request may
    call, None: all."""

    definitions: tuple[ToolDefinition, ...]
    mode: ToolMode = ToolMode.AUTO
    name: str = ""
    is_parallel: bool = True
    allowed: frozenset[str] | None = None

    @property
    def is_forced(self) -> bool:
        return self.mode in (ToolMode.REQUIRED, ToolMode.NAMED)

    @property
    def callable_definitions(self) -> tuple[ToolDefinition, ...]:
        """The tools that this request may call."""
        if self.mode is ToolMode.NONE:
            return ()
        allowed = frozenset([self.name]) if self.mode is ToolMode.NAMED else self.allowed
        return tuple(tool for tool in self.definitions if allowed is None or tool.name in allowed)

    def check(self) -> None:
        """Raise InvalidRequestError for the first thing that is not allowed."""
        if not 1 <= len(self.definitions) <= MAX_TOOLS:
            raise InvalidRequestError("tools", f"{len(self.definitions)} functions", f"1 to {MAX_TOOLS}")
        names = [tool.name for tool in self.definitions]
        for index, tool in enumerate(self.definitions):
            if not tool.name or len(tool.name) > 64 or names.index(tool.name) != index:
                raise InvalidRequestError(f"tools[{index}].name", tool.name, "1 to 64 characters, each name once")
            if not isinstance(parsed_json(tool.parameters or "{}"), dict):
                raise InvalidRequestError(f"tools[{index}].parameters", tool.parameters, "a JSON Schema object")
        chosen = {self.name} if self.mode is ToolMode.NAMED else self.allowed or set(names)
        if unknown := sorted(chosen - set(names)):
            raise InvalidRequestError("tool_choice", unknown[0], f"one of {', '.join(names)}")


@dataclass(frozen=True)
class Conversation:
    """A prompt to be rendered with the model's chat template.

    `continues_last_turn` leaves the last turn open, for the model to go on with; otherwise a new turn of the assistant
    is begun if `opens_answer`. `template_arguments` are handed to the template, `reasoning_effort` if it has such a
    switch; `ignores_unknown` drops what it has no use for.
    """

    turns: tuple[ChatTurn, ...]
    tools: Tools | None = None
    opens_answer: bool = True
    continues_last_turn: bool = False
    template_arguments: Mapping[str, Any] = field(default_factory=dict)
    reasoning_effort: str | None = None
    ignores_unknown: bool = False

    @property
    def shown_tools(self) -> tuple[ToolDefinition, ...]:
        """The tools that the model is told of: all or none, so that a choice does not change the prompt."""
        return () if self.tools is None or self.tools.mode is ToolMode.NONE else self.tools.definitions

    @property
    def num_chars(self) -> int:
        """Characters that the template is handed."""
        num_tool_chars = sum(len(tool.description) + len(tool.parameters) for tool in self.shown_tools)
        calls = (call for turn in self.turns for call in turn.tool_calls)
        num_said_chars = sum(len(turn.content) + len(turn.reasoning) for turn in self.turns)
        return num_tool_chars + num_said_chars + sum(len(call.arguments) for call in calls)

    def check(self) -> None:
        """Raise InvalidRequestError for the first thing that is not allowed."""
        if not self.turns:
            raise InvalidRequestError("prompt.chat.messages", [], "at least one message")
        for index, turn in enumerate(self.turns):
            where = f"prompt.chat.messages[{index}]"
            if turn.role not in CHAT_ROLES:
                raise InvalidRequestError(f"{where}.role", turn.role, ", ".join(CHAT_ROLES))
            if turn.tool_calls and turn.role != "assistant":
                raise InvalidRequestError(f"{where}.tool_calls", "set", "only in a message of the assistant")
        if self.continues_last_turn and self.turns[-1].role != "assistant":
            raise InvalidRequestError("continue_final_message", True, "only if the last message is the assistant's")
        if self.tools is not None:
            self.tools.check()


def parsed_json(text: str) -> Any:
    """The JSON value, or None where there is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None
