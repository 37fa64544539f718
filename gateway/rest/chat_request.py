"""The body of `/v1/chat/completions`, and the conversation it stands for."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field
from pydantic_core import PydanticCustomError

from easyspec.errors import InvalidRequestError
from gateway.conversation import ChatTurn, Conversation, ToolCall, ToolDefinition, ToolMode, Tools
from gateway.rest.fields import Boolean, Count, Integer, ListOf, RestModel, Text, Unsupported
from gateway.rest.generation_fields import GenerationFields

MAX_MESSAGES = 4096
MAX_PARTS = 4096
MAX_TOOLS = 1024


def _only_text(kind: object) -> object:
    if isinstance(kind, str) and kind != "text":
        raise PydanticCustomError(
            "unsupported_parameter",
            "content of type {kind} is not supported: this is a text model",
            {"kind": kind[:40]},
        )
    return kind


class TextPart(RestModel):
    """A part of a message's content."""

    type: Annotated[Literal["text"], BeforeValidator(_only_text)]
    text: Text


class CalledFunction(RestModel):
    """The function of a call in a message."""

    name: Text
    arguments: Text = Field(description="A JSON object as text.")


class MessageToolCall(RestModel):
    """A call that the assistant made before."""

    id: Text
    type: Literal["function"]
    function: CalledFunction
    index: Integer | None = Field(None, description="Accepted; has no effect.")


class Message(RestModel):
    """One message of the conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Text | Annotated[ListOf[TextPart], Field(max_length=MAX_PARTS)] | None = None
    name: Text | None = None
    tool_calls: ListOf[MessageToolCall] | None = Field(None, max_length=MAX_PARTS)
    tool_call_id: Text | None = None
    refusal: None = Field(None, description="Only null.")
    annotations: list[Any] | None = Field(None, max_length=0, description="Only empty.")
    audio: Unsupported = None
    function_call: Unsupported = None

    def turn(self, where: str) -> ChatTurn:
        if self.content is None and not self.tool_calls:
            raise InvalidRequestError(f"{where}.content", None, "text, or parts of type text")
        if self.role == "tool" and not self.tool_call_id:
            raise InvalidRequestError(f"{where}.tool_call_id", None, "the id of the call that is answered")
        parts = self.content or ""
        text = parts if isinstance(parts, str) else "\n".join(part.text for part in parts)
        calls = tuple(ToolCall(call.id, call.function.name, call.function.arguments) for call in self.tool_calls or ())
        return ChatTurn(self.role, text, calls, self.tool_call_id or "", self.name or "")


class FunctionDefinition(RestModel):
    """A function that can be called."""

    name: Annotated[Text, Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]
    description: Text | None = None
    parameters: dict[str, Any] | None = Field(None, description="JSON Schema of the arguments.")
    strict: Boolean | None = Field(None, description="Accepted: forced calls are always valid, others never checked.")


class ChatTool(RestModel):
    """A tool."""

    type: Literal["function"]
    function: FunctionDefinition

    def definition(self) -> ToolDefinition:
        parameters = self.function.parameters
        schema = json.dumps(parameters, ensure_ascii=False) if parameters is not None else ""
        return ToolDefinition(self.function.name, self.function.description or "", schema)


class ChosenFunction(RestModel):
    """The function of a named choice."""

    name: Text


class NamedToolChoice(RestModel):
    """A choice of one function."""

    type: Literal["function"]
    function: ChosenFunction


class ConversationFields(RestModel):
    """A conversation and how it is rendered; shared with `/tokenize`."""

    messages: ListOf[Message] = Field(min_length=1, max_length=MAX_MESSAGES)
    tools: ListOf[ChatTool] | None = Field(None, min_length=1, max_length=MAX_TOOLS)
    add_generation_prompt: Boolean | None = Field(None, description="False: do not begin the assistant's turn.")
    continue_final_message: Boolean | None = Field(None, description="Go on with the last message, an assistant's.")
    chat_template_kwargs: dict[str, Any] | None = Field(None, description="Handed to the model's chat template.")

    def conversation(self, mode: ToolMode = ToolMode.AUTO, name: str = "", is_parallel: bool = True) -> Conversation:
        """The plain form; InvalidRequestError for what types cannot tell."""
        if self.continue_final_message and self.add_generation_prompt:
            raise InvalidRequestError("continue_final_message", True, "false together with add_generation_prompt")
        turns = tuple(message.turn(f"messages[{index}]") for index, message in enumerate(self.messages))
        definitions = tuple(tool.definition() for tool in self.tools or ())
        return Conversation(
            turns,
            Tools(definitions, mode, name, is_parallel) if definitions else None,
            opens_answer=self.add_generation_prompt is not False,
            continues_last_turn=bool(self.continue_final_message),
            template_arguments=self.chat_template_kwargs or {},
        )


class ChatRequest(ConversationFields, GenerationFields):
    """Body of `/v1/chat/completions`."""

    max_completion_tokens: Count | None = Field(None, description="Most output tokens. Unset: what fits the context.")
    max_tokens: Count | None = Field(None, description="The older name of the same.")
    logprobs: Boolean | None = Field(None, description="Report log-probabilities of the output tokens.")
    top_logprobs: Integer | None = Field(None, description="And this many of the likeliest, 0 to 20.")
    tool_choice: Literal["none", "auto", "required"] | NamedToolChoice | None = None
    parallel_tool_calls: Boolean | None = Field(None, description="False: at most one call.")
    modalities: ListOf[Literal["text"]] | None = Field(None, description="Only text.")
    service_tier: Literal["auto", "default"] | None = Field(None, description="There is one tier.")
    store: Literal[False] | None = Field(None, description="Only false: nothing is stored.")
    prompt_cache_key: Text | None = Field(None, description="Accepted; has no effect.")
    prompt_cache_retention: Text | None = Field(None, description="Accepted; has no effect.")
    safety_identifier: Text | None = Field(None, description="Accepted; has no effect.")
    audio: Unsupported = None
    function_call: Unsupported = None
    functions: Unsupported = None
    moderation: Unsupported = None
    prediction: Unsupported = None
    prompt_cache_options: Unsupported = None
    reasoning_effort: Unsupported = None
    verbosity: Unsupported = None
    web_search_options: Unsupported = None

    @property
    def num_top_logprobs(self) -> int | None:
        if self.top_logprobs is not None and not self.logprobs:
            raise InvalidRequestError("top_logprobs", self.top_logprobs, "only together with logprobs")
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def most_tokens(self) -> int | None:
        if self.max_tokens is not None and self.max_completion_tokens not in (None, self.max_tokens):
            raise InvalidRequestError("max_tokens", self.max_tokens, "the same as max_completion_tokens, or unset")
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    def prompt(self) -> Conversation:
        """The conversation, with the choice of tools."""
        choice = self.tool_choice
        is_named = isinstance(choice, NamedToolChoice)
        if self.tools is None and (is_named or choice == "required"):
            raise InvalidRequestError("tool_choice", "set", "only together with tools")
        return self.conversation(
            ToolMode.NAMED if is_named else ToolMode(choice or "auto"),
            choice.function.name if isinstance(choice, NamedToolChoice) else "",
            self.parallel_tool_calls is not False,
        )
