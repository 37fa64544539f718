"""Tools for chat templates that know none: described in the system's message, calls and results told as text."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import groupby

from gateway.text.chat_template import ChatTemplate
from gateway.text.conversation import ChatTurn, Conversation, ToolCall

_ABOUT = "You can call functions. These exist, each with a JSON Schema of its arguments:\n"
_HOW = (
    "To call one, write nothing but\n"
    '<tool_call>\n{"name": "NAME", "arguments": {...}}\n</tool_call>\n'
    "and wait for its result, which comes as <tool_response>."
)


def with_described_tools(conversation: Conversation, template: ChatTemplate, is_described: bool) -> Conversation:
    """The conversation without anything that `template`, which knows no tools, would lose. The description goes to the
    system's message, or to the first one where the template takes none of the system; it is left out unless
    `is_described`."""
    turns = [*conversation.turns] if template.uses("tool_calls") else [*_told(conversation.turns)]
    if is_described and conversation.shown_tools:
        lines = "\n".join(json.dumps(tool.told, ensure_ascii=False) for tool in conversation.shown_tools)
        description, first = f"{_ABOUT}{lines}\n\n{_HOW}", turns[0]
        if template.takes_system and first.role not in ("system", "developer"):
            turns.insert(0, ChatTurn("system", description))
        else:
            turns[0] = replace(first, content=f"{first.content}\n\n{description}".lstrip())
    return replace(conversation, turns=tuple(turns), tools=None)


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
