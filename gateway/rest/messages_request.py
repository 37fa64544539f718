"""The body of `/v1/messages`, and the conversation it stands for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from easyspec.errors import InvalidRequestError
from easyspec.speculation.parameters import Grammar
from gateway.rest.chat_request import MAX_MESSAGES, FunctionFields
from gateway.rest.fields import (
    Boolean,
    Count,
    Integer,
    RestModel,
    Text,
    WrittenText,
    known_kinds,
    unsupported,
    without_kinds,
)
from gateway.rest.generation_fields import GenerationFields
from gateway.rest.structured import json_grammar
from gateway.rest.unknown_fields import ignores_unknown
from gateway.text.conversation import ChatTurn, Conversation, ToolCall, ToolMode, Tools

_BlockKind = Literal["text", "tool_use", "tool_result", "thinking", "redacted_thinking"]
# What tools of the service that wrote a history did there: no chat template has a place for it.
_LEFT_OUT = frozenset(
    {
        *("server_tool_use", "web_search_tool_result", "web_fetch_tool_result", "mcp_tool_use", "mcp_tool_result"),
        *("code_execution_tool_result", "bash_code_execution_tool_result", "text_editor_code_execution_tool_result"),
    }
)


class ContentBlock(RestModel):
    """A block of a message's content."""

    replayed: ClassVar = {"type": ("tool_use", "thinking", "redacted_thinking")}
    type: Annotated[_BlockKind, known_kinds(_BlockKind, "content of type {kind} is not supported")]
    text: Text | None = None
    thinking: Text | None = None
    id: Text | None = None
    name: Text | None = None
    input: WrittenText = None
    tool_use_id: Text | None = None
    content: Text | list[ContentBlock] | None = None
    is_error: Boolean | None = None
    toolset_name: Any = Field(None, description="Accepted; has no effect.")
    citations: Any = Field(None, description="Accepted; has no effect.")
    cache_control: Any = Field(None, description="Accepted; has no effect.")


class AnthropicMessage(RestModel):
    """One message of the conversation."""

    role: Literal["user", "assistant", "system"]
    content: Annotated[Text | list[ContentBlock], without_kinds(_LEFT_OUT)]


class AnthropicTool(FunctionFields):
    """A function that can be called."""

    type: Annotated[
        Literal["custom"] | None,
        known_kinds(Literal["custom"], "a tool of type {kind} is not supported: describe your own"),
    ] = None
    input_schema: dict[str, Any]
    cache_control: Any = Field(None, description="Accepted; has no effect.")
    input_examples: Any = Field(None, description="Accepted; has no effect.")
    eager_input_streaming: Any = Field(None, description="Accepted; has no effect.")


class AnthropicToolChoice(RestModel):
    """Whether tools are called."""

    type: Literal["auto", "any", "tool", "none"]
    name: Text | None = None
    disable_parallel_tool_use: Boolean | None = None


class ThinkingFields(RestModel):
    """`thinking`."""

    type: Literal["enabled", "disabled", "adaptive", "between_tools"]
    budget_tokens: Integer | None = Field(None, description="Accepted; has no effect.")
    display: Any = Field(None, description="Accepted; has no effect.")


class OutputFormat(RestModel):
    """`output_config.format`: a JSON Schema for the answer."""

    type: Literal["json_schema"]
    schema_: dict[str, Any] = Field(alias="schema")


class OutputConfig(RestModel):
    """`output_config`."""

    format: OutputFormat | None = None
    effort: Text | None = Field(None, description="Accepted; has no effect.")


class MessagesFields(GenerationFields):
    """What `/v1/messages` and `/v1/messages/count_tokens` have in common."""

    messages: list[AnthropicMessage] = Field(min_length=1, max_length=MAX_MESSAGES)
    system: Text | list[ContentBlock] | None = Field(None, description="A message of the system before all others.")
    tools: list[AnthropicTool] | None = Field(None, description="Functions.")
    tool_choice: AnthropicToolChoice | None = None
    thinking: ThinkingFields | None = Field(None, description="disabled: where the model's template has a switch.")
    chat_template_kwargs: dict[str, Any] | None = Field(None, description="Handed to the model's chat template.")
    output_config: OutputConfig | None = Field(None, description="`format`: a JSON Schema of the answer.")
    output_format: OutputFormat | None = Field(None, description="The older place of `output_config.format`.")
    prompt_logprobs: Annotated[None, unsupported("use /v1/chat/completions or /v1/completions")] = None
    cache_control: Any = Field(None, description="Accepted; has no effect.")

    def found_grammars(self) -> list[tuple[str, Grammar | None]]:
        newer = self.output_config.format if self.output_config is not None else None
        forms = (("output_config.format", newer), ("output_format", self.output_format))
        own = [(name, json_grammar(form.schema_)) for name, form in forms if form is not None]
        return [*own, *super().found_grammars()]

    @property
    def param_names(self) -> Mapping[str, str]:
        return {
            **super().param_names,
            "stop_strings": "stop_sequences",
            "prompt": "messages",
            "prompt_token_ids": "messages",
        }

    def conversation(self) -> Conversation:
        """The plain form; InvalidRequestError for what types cannot tell."""
        if self.num_choices != 1:
            raise InvalidRequestError("n", self.n, "1: a message is one")
        turns = [ChatTurn("system", text)] if (text := _text(self.system)) else []
        for index, message in enumerate(self.messages):
            turns += _turns(message, f"messages[{index}].content")
        is_disabled = self.thinking is not None and self.thinking.type == "disabled"
        return Conversation(
            tuple(turns),
            self._tools(),
            # A last message of the assistant is the beginning of the answer.
            continues_last_turn=turns[-1].role == "assistant" and not turns[-1].tool_calls,
            template_arguments=self.chat_template_kwargs or {},
            reasoning_effort="none" if is_disabled else None,
            ignores_unknown=ignores_unknown(),
        )

    def _tools(self) -> Tools | None:
        choice = self.tool_choice or AnthropicToolChoice.model_validate({"type": "auto"})
        if not self.tools:
            if choice.type in ("any", "tool"):
                raise InvalidRequestError("tool_choice", choice.type, "auto or none without tools")
            return None
        if (choice.type == "tool") != (choice.name is not None):
            raise InvalidRequestError("tool_choice.name", choice.name, "set with type tool, and only then")
        definitions = tuple(tool.definition_by(tool.input_schema) for tool in self.tools)
        return Tools(definitions, _MODES[choice.type], choice.name or "", not choice.disable_parallel_tool_use)


_MODES = {"auto": ToolMode.AUTO, "any": ToolMode.REQUIRED, "tool": ToolMode.NAMED, "none": ToolMode.NONE}


class MessagesRequest(MessagesFields):
    """Body of `/v1/messages`."""

    max_tokens: Count = Field(description="Most output tokens.")
    stop_sequences: list[Text] | None = Field(None, description="At most 16 texts that end the output.")

    @property
    def stop_strings(self) -> tuple[str, ...]:
        return (*super().stop_strings, *(self.stop_sequences or ()))


def _turns(message: AnthropicMessage, where: str) -> Iterator[ChatTurn]:
    """The results of calls are turns of their own, before what else the user says."""
    if isinstance(message.content, str):
        yield ChatTurn(message.role, message.content)
        return
    for index, block in enumerate(message.content):
        if block.type == "tool_result":
            if not block.tool_use_id:
                raise InvalidRequestError(f"{where}[{index}].tool_use_id", None, "the id of the call that is answered")
            yield ChatTurn("tool", _text(block.content), tool_call_id=block.tool_use_id)
    called = [block for block in message.content if block.type == "tool_use"]
    calls = tuple(ToolCall(block.id or "", block.name or "", block.input or "") for block in called)
    thoughts = [block.thinking or "" for block in message.content if block.type == "thinking"]
    said = _text(message.content)
    if said or calls or thoughts or not any(block.type == "tool_result" for block in message.content):
        yield ChatTurn(message.role, said, calls, reasoning="\n".join(thoughts))


def _text(content: str | Sequence[ContentBlock] | None) -> str:
    if isinstance(content, str):
        return content
    return "\n".join(block.text or "" for block in content or () if block.type == "text")
