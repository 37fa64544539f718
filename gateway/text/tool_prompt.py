"""Tools for chat templates that know none: described in the system's message, calls and results told as text."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import groupby

from gateway.text.chat_template import ChatTemplate
from gateway.text.conversation import ChatTurn, Conversation, ToolCall, ToolDefinition

_ABOUT = "You can call functions. These exist, each with a JSON Schema of its arguments:\n"
_HOW = (
    "To call one, write nothing but\n"
    '<tool_call>\n{"name": "NAME", "arguments": {...}}\n</tool_call>\n'
    "and wait for its result, which comes as <tool_response>."
)


def with_described_tools(conversation: Conversation, template: ChatTemplate, is_described: bool) -> Conversation:
    """The conversation without anything that `template`, which knows no tools, would lose.

    The description goes to the system's message, or to the first one where the template takes none of the system; it is
    left out unless `is_described`.
    """
    turns = [*conversation.turns] if template.uses("tool_calls") else [*_told(conversation.turns)]
    tools = conversation.tools
    if is_described and tools is not None and tools.shown_definitions:
        lines = "\n".join(_line(tool) for tool in tools.shown_definitions)
        turns = _introduced(turns, f"{_ABOUT}{lines}\n\n{_HOW}", template.takes_system)
    return replace(conversation, turns=tuple(turns), tools=None)


def _line(tool: ToolDefinition) -> str:
    about = {"name": tool.name, "description": tool.description, "parameters": tool.schema}
    return json.dumps(about, ensure_ascii=False)


def _introduced(turns: Sequence[ChatTurn], description: str, takes_system: bool) -> list[ChatTurn]:
    """The turns, the first of which describes the tools."""
    first = turns[0]
    if takes_system and first.role not in ("system", "developer"):
        return [ChatTurn("system", description), *turns]
    return [replace(first, content=f"{first.content}\n\n{description}".lstrip()), *turns[1:]]


def _written(call: ToolCall) -> str:
    arguments = call.arguments.strip() or "{}"
    return f'<tool_call>\n{{"name": {json.dumps(call.name)}, "arguments": {arguments}}}\n</tool_call>'


def _told(turns: Sequence[ChatTurn]) -> Iterator[ChatTurn]:
    """Calls as their assistant would write them, the results of a run of calls as one message of the user."""
    for is_result, group in groupby(turns, key=lambda turn: turn.role == "tool"):
        if is_result:
            results = "\n".join(f"<tool_response>\n{turn.content}\n</tool_response>" for turn in group)
            yield ChatTurn("user", results)
            continue
        for turn in group:
            calls = [_written(call) for call in turn.tool_calls]
            content = "\n".join([turn.content, *calls] if turn.content else calls)
            yield replace(turn, content=content, tool_calls=()) if calls else turn
