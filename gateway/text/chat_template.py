"""Chat templates: which one a conversation is rendered with, and in what form it takes the messages. A template is a
program of its model's makers. What it knows is read from its source, or found by rendering a probe."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any, TypeAlias

from easyspec.errors import InvalidRequestError, UnsupportedFieldError
from gateway.text.conversation import ChatTurn, Conversation, ToolCall, parsed_json
from gateway.text.hidden_texts import HiddenTexts
from gateway.text.template_process import TemplateLimitError, template_process

# What the library takes for itself beside what it hands to a template.
_RENDER_ARGUMENTS = frozenset(
    {"conversation", "messages", "tools", "documents", "chat_template", "add_generation_prompt", "tokenize"}
    | {"continue_final_message", "sanitize_control_tokens", "padding", "truncation", "max_length", "return_tensors"}
    | {"return_dict", "return_assistant_tokens_mask", "tokenizer_kwargs"}
)
# What the library does anyway, and what templates without such a switch do.
_NEUTRAL_ARGUMENTS: Mapping[str, Any] = {"add_generation_prompt": True, "enable_thinking": True}
# Where models keep what they thought before they answered.
_REASONING_FIELDS = ("reasoning_content", "reasoning", "thinking")
_SILENT_EFFORTS = frozenset({"none", "minimal"})
_DEFAULT_EFFORT = "medium"  # some clients name what they would get anyway
_DEFAULT_TEMPLATE, _TOOL_TEMPLATE = "default", "tool_use"
_PROBE = "easyspecprobe"

ArgumentForm: TypeAlias = Callable[[ToolCall, HiddenTexts], Any]


class ChatTemplate:
    """One template, which is handed `special_tokens` by their names."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        self.source = source
        self._special_tokens = special_tokens
        self._takes_parts: dict[str, bool] = {}

    @cached_property
    def knows_tools(self) -> bool:
        return self.uses("tools")

    @cached_property
    def takes_system(self) -> bool:
        """Whether a message of the system comes through."""
        probe = [{"role": "system", "content": _PROBE}, {"role": "user", "content": "x"}]
        return self.takes_parts("system") or _PROBE in self._tried(probe)

    def uses(self, name: str) -> bool:
        return re.search(rf"\b{re.escape(name)}\b", self.source) is not None

    def takes_parts(self, role: str) -> bool:
        """Whether the content of such a message must be a list of parts: as a text it would not be seen."""
        if role not in self._takes_parts:
            as_text = self._tried(_probe(role, _PROBE))
            as_parts = "" if _PROBE in as_text else self._tried(_probe(role, [{"type": "text", "text": _PROBE}]))
            self._takes_parts[role] = _PROBE in as_parts
        return self._takes_parts[role]

    def render(self, conversation: Conversation, hidden: HiddenTexts) -> str:
        """The conversation as text; what `hidden` must not let through stands in it under another name. Raises
        InvalidRequestError with the template's own words if it refuses."""
        arguments = self._arguments(conversation)
        tools = [{"type": "function", "function": tool.told} for tool in conversation.shown_tools]
        failure: Exception | None = None
        # Most templates want a call's arguments as an object, some as text; text that is not an object may fit neither.
        for form in (_as_object, _as_text, _as_only_argument):
            messages = [self._message(turn, form, hidden) for turn in conversation.turns]
            try:
                return self._rendered(
                    messages,
                    tools=hidden.hide_in(tools) or None,
                    add_generation_prompt=conversation.opens_answer and not conversation.continues_last_turn,
                    continue_final_message=conversation.continues_last_turn,
                    **{name: hidden.hide_in(value) for name, value in arguments.items()},
                )
            except TemplateLimitError as error:
                failure = error
                break
            except Exception as error:  # templates are programs and refuse in their own words
                failure = failure or error
                if not any(turn.tool_calls for turn in conversation.turns):
                    break
        shown = f"{len(conversation.turns)} messages"
        raise InvalidRequestError("prompt.chat.messages", shown, str(failure)) from failure

    def _message(self, turn: ChatTurn, form: ArgumentForm, hidden: HiddenTexts) -> dict[str, Any]:
        role = "system" if turn.role == "developer" and not self.uses("developer") else turn.role
        content: Any = hidden.hide(turn.content, of_assistant=role == "assistant")
        if self.takes_parts(role):
            content = [{"type": "text", "text": content}]
        message: dict[str, Any] = {"role": role, "content": content}
        if turn.reasoning:
            reasoning = hidden.hide(turn.reasoning, of_assistant=True)
            message |= {name: reasoning for name in _REASONING_FIELDS if self.uses(name)}
        if turn.tool_calls:
            message["tool_calls"] = [
                {
                    "id": hidden.hide(call.id),
                    "type": "function",
                    "function": {"name": hidden.hide(call.name), "arguments": form(call, hidden)},
                }
                for call in turn.tool_calls
            ]
        if turn.tool_call_id:
            message["tool_call_id"] = hidden.hide(turn.tool_call_id)
        if turn.name:
            message["name"] = hidden.hide(turn.name)
        return message

    def _arguments(self, conversation: Conversation) -> dict[str, Any]:
        """What the template is handed beside messages and tools. Raises InvalidRequestError for names it has no use
        for, unless they say what happens anyway."""
        arguments = {}
        for name, value in conversation.template_arguments.items():
            if name not in _RENDER_ARGUMENTS and self.uses(name):
                arguments[name] = value
                continue
            is_off = value is None if name in _RENDER_ARGUMENTS else not value
            says_what_happens_anyway = is_off or (name in _NEUTRAL_ARGUMENTS and value == _NEUTRAL_ARGUMENTS[name])
            if not (says_what_happens_anyway or conversation.ignores_unknown):
                raise InvalidRequestError("chat_template_kwargs", name, "names that the model's chat template uses")
        effort = conversation.reasoning_effort
        if effort is None or "reasoning_effort" in arguments:
            return arguments
        if self.uses("reasoning_effort"):
            arguments["reasoning_effort"] = effort
        elif self.uses("enable_thinking"):
            arguments.setdefault("enable_thinking", effort not in _SILENT_EFFORTS)
        elif effort not in {*_SILENT_EFFORTS, _DEFAULT_EFFORT} and not conversation.ignores_unknown:
            allowed = "none: the model's chat template has no such switch"
            raise UnsupportedFieldError("reasoning_effort", effort, allowed)
        return arguments

    def _rendered(self, messages: Sequence[Mapping[str, Any]], **arguments: Any) -> str:
        return template_process().render(self.source, messages=messages, **{**self._special_tokens, **arguments})

    def _tried(self, messages: Sequence[Mapping[str, Any]]) -> str:
        try:
            return self._rendered(messages, tools=None, add_generation_prompt=False, continue_final_message=False)
        except Exception:  # whatever a template makes of a probe
            return ""


class ChatTemplates:
    """The templates of a checkpoint by name, as its files have them, or `replacement` in their place."""

    def __init__(self, tokenizer: Any, replacement: str | None = None) -> None:
        own = tokenizer.chat_template if replacement is None else replacement
        sources = own if isinstance(own, Mapping) else {_DEFAULT_TEMPLATE: own or ""}
        tokens = {name: str(text) for name, text in tokenizer.special_tokens_map.items() if isinstance(text, str)}
        self._templates = {str(name): ChatTemplate(str(text), tokens) for name, text in sources.items() if text}

    def find(self, has_tools: bool) -> ChatTemplate | None:
        """The template for conversations with or without tools; None if there is none for them."""
        tool_template = self._templates.get(_TOOL_TEMPLATE) if has_tools else None
        return tool_template or self._templates.get(_DEFAULT_TEMPLATE)

    def select(self, has_tools: bool) -> ChatTemplate:
        """As `find`; raises InvalidRequestError, which names the templates there are."""
        template = self.find(has_tools)
        if template is not None:
            return template
        if not self._templates:
            raise InvalidRequestError("prompt", "a conversation", "text or token ids: the model has no chat template")
        shown = "a conversation with tools" if has_tools else "a conversation without tools"
        allowed = f"one for the model's chat templates, which are {', '.join(sorted(self._templates))}"
        raise InvalidRequestError("prompt.chat.messages", shown, allowed)


def _probe(role: str, content: Any) -> list[dict[str, Any]]:
    """A conversation in which a message of `role` may stand, with this content."""
    user = {"role": "user", "content": _like(content, "x")}
    message: dict[str, Any] = {"role": role, "content": content}
    if role == "user":
        return [message]
    if role == "assistant":
        return [user, message]
    if role == "tool":
        function = {"name": "f", "arguments": {}}
        calls = [{"id": "a12345678", "type": "function", "function": function}]
        return [user, {"role": "assistant", "content": _like(content, ""), "tool_calls": calls}, message]
    return [message, user]


def _like(content: Any, text: str) -> Any:
    """The text in the form that `content` has."""
    return text if isinstance(content, str) else [{"type": "text", "text": text}]


def _as_object(call: ToolCall, hidden: HiddenTexts) -> Any:
    """The object that a call's arguments are; a text that is none stays as it is."""
    if not call.arguments.strip():
        return {}
    value = parsed_json(call.arguments)
    return hidden.hide_in(value) if isinstance(value, dict) else hidden.raw(call.arguments)


def _as_text(call: ToolCall, hidden: HiddenTexts) -> Any:
    return hidden.raw(call.arguments if call.arguments.strip() else "{}")


def _as_only_argument(call: ToolCall, hidden: HiddenTexts) -> Any:
    """For templates that go through an object's entries."""
    value = _as_object(call, hidden)
    return value if isinstance(value, dict) else {"arguments": value}
