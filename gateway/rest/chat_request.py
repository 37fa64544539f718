"""The body of `/v1/chat/completions`, and the conversation it stands for."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, TypeAlias

from pydantic import Field, model_validator

from easyspec.errors import InvalidRequestError
from gateway.rest.fields import (
    Boolean,
    Count,
    Integer,
    ListOf,
    RestModel,
    Text,
    WrittenText,
    json_text,
    known_kinds,
    unsupported,
)
from gateway.rest.generation_fields import ChoicesFields
from gateway.rest.unknown_fields import ignores_unknown
from gateway.text.conversation import ChatTurn, Conversation, ToolCall, ToolDefinition, ToolMode, Tools

MAX_MESSAGES = 4096
MAX_PARTS = 4096
MAX_TOOLS = 1024

_PartKind = Literal["text", "refusal", "input_text", "output_text", "thinking", "reasoning", "redacted_thinking"]
_THOUGHTS = ("thinking", "reasoning", "redacted_thinking")


class TextPart(RestModel):
    """A part of a message's content."""

    replayed: ClassVar = {"type": (*_THOUGHTS, "refusal", "output_text")}
    type: Annotated[_PartKind, known_kinds(_PartKind, "content of type {kind} is not supported")]
    text: Text | None = None
    refusal: Text | None = Field(None, description="Of a part of type refusal.")
    thinking: Text | None = Field(None, description="Of a part of type thinking.")
    cache_control: Any = Field(None, description="Accepted; has no effect.")
    prompt_cache_breakpoint: Any = Field(None, description="Accepted; has no effect.")
    citations: Any = Field(None, description="Accepted; has no effect.")

    @property
    def is_thought(self) -> bool:
        return self.type in _THOUGHTS

    @property
    def shown(self) -> str:
        if self.type == "refusal":
            return self.refusal or ""
        return (self.thinking if self.is_thought and self.thinking is not None else self.text) or ""


class CalledFunction(RestModel):
    """The function of a call in a message."""

    name: Text
    arguments: WrittenText = Field(
        None, description="What the assistant wrote, an object in JSON if all went well; an object is taken as well."
    )

    @classmethod
    def is_replayed(cls, values: Mapping[str, Any]) -> bool:
        return True


class MessageToolCall(RestModel):
    """A call that the assistant made before. A custom tool's input stands for arguments."""

    id: Text | None = None
    type: Literal["function"] | None = None
    function: CalledFunction

    @model_validator(mode="before")
    @classmethod
    def _as_function(cls, values: Any) -> Any:
        custom = values.get("custom") if isinstance(values, dict) and values.get("type") == "custom" else None
        if not isinstance(custom, dict):
            return values
        called = {"name": custom.get("name"), "arguments": custom.get("input")}
        return {"id": values.get("id"), "type": "function", "function": called}

    @classmethod
    def is_replayed(cls, values: Mapping[str, Any]) -> bool:
        return True


class Message(RestModel):
    """One message of the conversation."""

    replayed: ClassVar = {"role": ("assistant",)}
    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: Text | Annotated[ListOf[TextPart], Field(max_length=MAX_PARTS)] | None = None
    name: Text | None = None
    tool_calls: ListOf[MessageToolCall] | None = Field(None, max_length=MAX_PARTS)
    tool_call_id: Text | None = None
    function_call: CalledFunction | None = Field(None, description="An assistant's call, as older clients send it.")
    reasoning_content: Text | None = Field(None, description="What an assistant thought before its answer.")
    reasoning: Text | None = Field(None, description="Another name of the same.")
    thinking: Text | None = Field(None, description="Another name of the same.")
    refusal: Text | None = Field(None, description="An assistant's, in place of content.")
    cache_control: Any = Field(None, description="Accepted; has no effect.")
    id: Any = Field(None, description="Accepted; has no effect.")
    status: Any = Field(None, description="Accepted; has no effect.")
    is_error: Any = Field(None, description="Accepted; has no effect.")
    provider_specific_fields: Any = Field(None, description="Accepted; has no effect.")
    audio: Annotated[None, unsupported("this is a text model")] = None
    partial: Annotated[None, unsupported("use continue_final_message")] = None
    prefix: Annotated[None, unsupported("use continue_final_message")] = None

    @model_validator(mode="before")
    @classmethod
    def _as_text(cls, values: Any) -> Any:
        """What some clients make of texts: results of tools as objects, parts that are texts, thinking in objects."""
        if not isinstance(values, dict):
            return values
        taken = dict(values)
        if isinstance(content := values.get("content"), list):
            taken["content"] = [{"type": "text", "text": part} if isinstance(part, str) else part for part in content]
        elif isinstance(content, dict) and values.get("role") in ("tool", "function"):
            taken["content"] = json_text(content)
        if cls.is_replayed(values):
            for name in ("reasoning_content", "reasoning", "thinking"):
                if not isinstance(values.get(name), str):
                    taken.pop(name, None)
        return taken

    def turn(self, where: str) -> ChatTurn:
        if "content" not in self.model_fields_set and self.role in ("system", "developer", "user"):
            raise InvalidRequestError(f"{where}.content", None, "text, or parts of type text")
        if self.role == "function":  # names the function in place of an id
            return ChatTurn("tool", self._said(), tool_call_id=self.name or "", name=self.name or "")
        if self.role == "tool" and not self.tool_call_id:
            raise InvalidRequestError(f"{where}.tool_call_id", None, "the id of the call that is answered")
        is_assistant = self.role == "assistant"
        parts = self.content or ""
        thoughts = [] if isinstance(parts, str) else [part.shown for part in parts if part.is_thought]
        called = [(call.id or "", call.function) for call in self.tool_calls or ()]
        if not called and self.function_call is not None:
            called = [(self.function_call.name, self.function_call)]
        calls = tuple(ToolCall(call_id, function.name, function.arguments or "") for call_id, function in called)
        given = self.reasoning_content or self.reasoning or self.thinking or "\n".join(thoughts)
        reasoning = given if is_assistant else ""
        return ChatTurn(self.role, self._said(), calls, self.tool_call_id or "", self.name or "", reasoning)

    def _said(self) -> str:
        parts = self.content or (self.refusal if self.role == "assistant" else None) or ""
        return parts if isinstance(parts, str) else "\n".join(part.shown for part in parts if not part.is_thought)


ToolName: TypeAlias = Annotated[Text, Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]


class FunctionFields(RestModel):
    """What is told of a function in any API."""

    name: ToolName
    description: Text | None = None
    strict: Boolean | None = Field(
        None, description="True: refuse to force calls whose schema cannot be enforced whole."
    )

    def definition_by(self, schema: dict[str, Any] | None) -> ToolDefinition:
        """The plain form; `schema` is the JSON Schema of the arguments."""
        parameters = json.dumps(schema, ensure_ascii=False) if schema is not None else ""
        return ToolDefinition(self.name, self.description or "", parameters, bool(self.strict))


class FunctionDefinition(FunctionFields):
    """A function that can be called."""

    parameters: dict[str, Any] | None = Field(None, description="JSON Schema of the arguments.")
    cache_control: Any = Field(None, description="Accepted; has no effect.")


class ChatTool(RestModel):
    """A tool."""

    type: Literal["function"]
    function: FunctionDefinition
    cache_control: Any = Field(None, description="Accepted; has no effect.")


class ChosenFunction(RestModel):
    """The function of a named choice."""

    name: Text


class NamedToolChoice(RestModel):
    """A choice of one function."""

    type: Literal["function"]
    function: ChosenFunction


class AllowedTools(RestModel):
    """`tool_choice.allowed_tools`."""

    mode: Literal["auto", "required"]
    tools: ListOf[NamedToolChoice] = Field(min_length=1, max_length=MAX_TOOLS)


class AllowedToolsChoice(RestModel):
    """A choice among some of the tools, all of which the model is told of."""

    type: Literal["allowed_tools"]
    allowed_tools: AllowedTools


def chosen_tools(
    definitions: tuple[ToolDefinition, ...],
    is_parallel: bool | None,
    mode: str | None = None,
    name: str | None = None,
    allowed: frozenset[str] | None = None,
) -> Tools | None:
    """What may be called by a `tool_choice`: by a mode, of all functions or those `allowed`, or one of that name."""
    if definitions:
        how = ToolMode(mode or "auto") if name is None else ToolMode.NAMED
        return Tools(definitions, how, name or "", is_parallel is not False, allowed)
    if name is not None or mode == "required":
        raise InvalidRequestError("tool_choice", "set", "only together with tools")
    return None


class ThinkingSwitch(RestModel):
    """`thinking`, by which other servers' clients say whether to think."""

    type: Literal["enabled", "disabled"]


class ReasoningWish(RestModel):
    """`reasoning`, by which routers' clients say how much to think."""

    effort: Text | None = None
    enabled: Boolean | None = None


class ConversationFields(RestModel):
    """A conversation and how it is rendered; shared with `/tokenize`."""

    messages: ListOf[Message] = Field(min_length=1, max_length=MAX_MESSAGES)
    tools: ListOf[ChatTool] | None = Field(None, max_length=MAX_TOOLS)
    add_generation_prompt: Boolean | None = Field(None, description="False: do not begin the assistant's turn.")
    continue_final_message: Boolean | None = Field(None, description="Go on with the last message, an assistant's.")
    chat_template_kwargs: dict[str, Any] | None = Field(None, description="Handed to the model's chat template.")
    reasoning_effort: Text | None = Field(
        None, description="How much to think, where the model's chat template has such a switch."
    )
    enable_thinking: Boolean | None = Field(None, description="As in `chat_template_kwargs`.")
    thinking: ThinkingSwitch | None = Field(None, description="`type`: as `reasoning_effort` none or high.")
    reasoning: ReasoningWish | None = Field(None, description="`effort`, or `enabled`: as `reasoning_effort`.")

    @property
    def effort(self) -> tuple[str, str | None]:
        """The field that says how much to think, and how much; None: none says so."""
        if self.reasoning_effort is not None:
            return "reasoning_effort", self.reasoning_effort
        if self.thinking is not None:
            return "thinking", _effort(self.thinking.type == "enabled")
        if self.reasoning is not None and self.reasoning.effort is None and self.reasoning.enabled is not None:
            return "reasoning", _effort(self.reasoning.enabled)
        return "reasoning", self.reasoning.effort if self.reasoning is not None else None

    @property
    def definitions(self) -> tuple[ToolDefinition, ...]:
        return tuple(tool.function.definition_by(tool.function.parameters) for tool in self.tools or ())

    @property
    def usable_tools(self) -> Tools | None:
        return Tools(self.definitions) if self.tools else None

    def conversation(self) -> Conversation:
        """The plain form; InvalidRequestError for what types cannot tell."""
        if self.continue_final_message and self.add_generation_prompt:
            raise InvalidRequestError("continue_final_message", True, "false together with add_generation_prompt")
        turns = tuple(message.turn(f"messages[{index}]") for index, message in enumerate(self.messages))
        switches = {} if self.enable_thinking is None else {"enable_thinking": self.enable_thinking}
        return Conversation(
            turns,
            self.usable_tools,
            opens_answer=self.add_generation_prompt is not False,
            continues_last_turn=bool(self.continue_final_message),
            template_arguments=switches | (self.chat_template_kwargs or {}),
            reasoning_effort=self.effort[1],
            ignores_unknown=ignores_unknown(),
        )


def _effort(is_wanted: bool) -> str:
    return "high" if is_wanted else "none"


class ChatRequest(ConversationFields, ChoicesFields):
    """Body of `/v1/chat/completions`."""

    max_completion_tokens: Count | None = Field(None, description="Most output tokens. Unset: what fits the context.")
    max_tokens: Count | None = Field(None, description="The older name of the same.")
    logprobs: Boolean | None = Field(None, description="Report log-probabilities of the output tokens.")
    top_logprobs: Integer | None = Field(None, description="And this many of the likeliest, 0 to 20.")
    tool_choice: Literal["none", "auto", "required"] | NamedToolChoice | AllowedToolsChoice | None = None
    parallel_tool_calls: Boolean | None = Field(None, description="False: at most one call.")
    modalities: ListOf[Literal["text"]] | None = Field(None, description="Only text.")
    audio: Annotated[None, unsupported("this is a text model")] = None
    function_call: Annotated[None, unsupported("use tool_choice")] = None
    functions: Annotated[None, unsupported("use tools")] = None
    moderation: Annotated[None, unsupported("there is no moderation here")] = None
    prediction: Annotated[None, unsupported("the drafter predicts; no hint is needed")] = None
    prompt_cache_options: Annotated[None, unsupported("there is no cache that a client could steer")] = None
    verbosity: Annotated[None, unsupported("the model has no such switch")] = None
    web_search_options: Annotated[None, unsupported("there is no web search")] = None

    @property
    def num_top_logprobs(self) -> int | None:
        if self.top_logprobs and not self.logprobs:
            raise InvalidRequestError("top_logprobs", self.top_logprobs, "only together with logprobs")
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def most_tokens(self) -> int | None:
        if self.max_tokens is not None and self.max_completion_tokens not in (None, self.max_tokens):
            raise InvalidRequestError("max_tokens", self.max_tokens, "the same as max_completion_tokens, or unset")
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def param_names(self) -> Mapping[str, str]:
        most_tokens = "max_tokens" if self.max_completion_tokens is None else "max_completion_tokens"
        return {
            **super().param_names,
            "stop.max_tokens": most_tokens,
            "prompt": "messages",
            "prompt_token_ids": "messages",
            "reasoning_effort": self.effort[0],
        }

    @property
    def usable_tools(self) -> Tools | None:
        choice, definitions, is_parallel = self.tool_choice, self.definitions, self.parallel_tool_calls
        if isinstance(choice, NamedToolChoice):
            return chosen_tools(definitions, is_parallel, name=choice.function.name)
        if isinstance(choice, AllowedToolsChoice):
            allowed = frozenset(each.function.name for each in choice.allowed_tools.tools)
            return chosen_tools(definitions, is_parallel, choice.allowed_tools.mode, allowed=allowed)
        return chosen_tools(definitions, is_parallel, choice)
