"""The body of `/v1/responses`, and the conversation it stands for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Annotated, Any, ClassVar, Literal, TypeAlias

from pydantic import Field, model_validator

from easyspec.errors import InvalidRequestError
from gateway.rest.chat_request import FunctionFields, chosen_tools
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
from gateway.rest.structured import JsonSchemaFormat
from gateway.rest.unknown_fields import ignores_unknown
from gateway.text.conversation import ChatTurn, Conversation, ToolCall, Tools

MAX_ITEMS = 4096
# The item of an id, as it was given out.
FindItem: TypeAlias = Callable[[str], "dict[str, Any] | None"]

_ItemKind = Literal["message", "function_call", "function_call_output", "reasoning", "item_reference"]
# What other servers' own tools did in a history that comes from there: no chat template has a place for it.
_LEFT_OUT = frozenset(
    {
        *("web_search_call", "file_search_call", "code_interpreter_call", "image_generation_call", "computer_call"),
        *("local_shell_call", "shell_call", "apply_patch_call", "tool_search_call", "mcp_call", "mcp_list_tools"),
        "compaction",
    }
)
_REFERABLE = "the id of an item that this gateway gave lately: set store to false, and send items themselves"
_PartKind = Literal["input_text", "output_text", "text", "refusal", "reasoning_text", "summary_text"]


class ContentPart(RestModel):
    """A part of an item's content."""

    replayed: ClassVar = {"type": ("output_text", "refusal", "reasoning_text", "summary_text")}
    type: Annotated[_PartKind, known_kinds(_PartKind, "content of type {kind} is not supported")]
    text: Text | None = None
    refusal: Text | None = None
    prompt_cache_breakpoint: Any = Field(None, description="Accepted; has no effect.")

    @property
    def shown(self) -> str:
        return self.text or self.refusal or ""


class InputItem(RestModel):
    """A message, a call of a function, its output, or what was thought before. Custom tools are taken for functions
    whose arguments are their input."""

    replayed: ClassVar = {"role": ("assistant",), "type": ("function_call", "reasoning")}
    type: Annotated[_ItemKind, known_kinds(_ItemKind, "an item of type {kind} is not supported")] = "message"
    role: Literal["system", "developer", "user", "assistant"] | None = None
    content: Text | list[ContentPart] | None = None
    call_id: Text | None = None
    name: Text | None = None
    arguments: WrittenText = None
    output: Text | list[ContentPart] | None = None
    summary: list[ContentPart] | None = None
    id: Any = Field(None, description="Of type item_reference: the item's. Else it has no effect.")
    status: Any = Field(None, description="Accepted; has no effect.")
    phase: Any = Field(None, description="Accepted; has no effect.")
    caller: Any = Field(None, description="Accepted; has no effect.")
    namespace: Any = Field(None, description="Accepted; has no effect.")

    @model_validator(mode="before")
    @classmethod
    def _as_function(cls, values: Any) -> Any:
        kind = values.get("type") if isinstance(values, dict) else None
        if kind == "custom_tool_call":
            return {**values, "type": "function_call", "arguments": values.get("input")}
        return {**values, "type": "function_call_output"} if kind == "custom_tool_call_output" else values


class ResponseTool(FunctionFields):
    """A function that can be called."""

    type: Annotated[
        Literal["function"],
        known_kinds(Literal["function"], "a tool of type {kind} is not supported: use functions"),
    ]
    parameters: dict[str, Any] | None = None


class ChosenTool(RestModel):
    """A choice of one function."""

    type: Literal["function"]
    name: Text


class AllowedToolsChoice(RestModel):
    """A choice among some of the functions, all of which the model is told of."""

    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: list[ChosenTool] = Field(min_length=1)


class TextFormat(JsonSchemaFormat):
    """`text.format`: what `response_format` is in chat completions."""

    type: Literal["text", "json_object", "json_schema"]


class TextFields(RestModel):
    """`text`."""

    format: TextFormat | None = None
    verbosity: Literal["medium"] | None = None


class ReasoningFields(RestModel):
    """`reasoning`."""

    effort: Text | None = None
    summary: Any = Field(None, description="Accepted; has no effect.")
    generate_summary: Any = Field(None, description="Accepted; has no effect.")
    context: Any = Field(None, description="Accepted; has no effect.")


class ResponsesRequest(GenerationFields):
    """Body of `/v1/responses`."""

    input: Text | Annotated[list[InputItem], Field(min_length=1, max_length=MAX_ITEMS), without_kinds(_LEFT_OUT)]
    instructions: Text | None = Field(None, description="A message of the system before all others.")
    max_output_tokens: Count | None = Field(None, description="Most output tokens. Unset: what fits the context.")
    tools: list[ResponseTool] | None = Field(None, description="Functions.")
    tool_choice: Literal["none", "auto", "required"] | ChosenTool | AllowedToolsChoice | None = None
    parallel_tool_calls: Boolean | None = Field(None, description="False: at most one call.")
    text: TextFields | None = Field(None, description="The form of the answer.")
    reasoning: ReasoningFields | None = Field(None, description="`effort`, where the model's template has a switch.")
    chat_template_kwargs: dict[str, Any] | None = Field(None, description="Handed to the model's chat template.")
    include: list[Text] | None = Field(None, description="`message.output_text.logprobs`; others have no effect.")
    top_logprobs: Integer | None = Field(None, description="This many of the likeliest at each token, 0 to 20.")
    truncation: Literal["auto", "disabled"] | None = Field(None, description="Accepted; nothing is ever cut.")
    client_metadata: Any = Field(None, description="Accepted; has no effect.")
    access_programs: Annotated[None, unsupported("there are none here")] = None
    background: Annotated[None, unsupported("every request is answered while its client waits")] = None
    background_options: Annotated[None, unsupported("every request is answered while its client waits")] = None
    context_management: Annotated[None, unsupported("the client says what the model is shown")] = None
    conversation: Annotated[None, unsupported("nothing is stored: send all messages")] = None
    image: Annotated[None, unsupported("these are text models")] = None
    max_tool_calls: Annotated[None, unsupported("calls are made by the client")] = None
    moderation: Annotated[None, unsupported("there is no moderation here")] = None
    previous_response_id: Annotated[None, unsupported("nothing is stored: send all items of the conversation")] = None
    prompt: Annotated[None, unsupported("there are no stored prompts")] = None
    prompt_cache_options: Annotated[None, unsupported("there is no cache that a client could steer")] = None
    prompt_logprobs: Annotated[None, unsupported("use /v1/chat/completions or /v1/completions")] = None

    @property
    def num_top_logprobs(self) -> int | None:
        wants = "message.output_text.logprobs" in (self.include or ())
        return self.top_logprobs or 0 if wants or self.top_logprobs else None

    @property
    def param_names(self) -> Mapping[str, str]:
        return {
            **super().param_names,
            "stop.max_tokens": "max_output_tokens",
            "reasoning_effort": "reasoning.effort",
            "prompt": "input",
            "prompt.chat.messages": "input",
            "prompt_token_ids": "input",
        }

    def forms(self) -> list[tuple[str, str, JsonSchemaFormat | None]]:
        form = self.text.format if self.text is not None else None
        return [*([("text.format", form.type, form)] if form is not None else []), *super().forms()]

    def prompt_conversation(self, find: FindItem) -> Conversation:
        """The plain form; `find` knows what ids refer to. InvalidRequestError for what types cannot tell."""
        if self.num_choices != 1:
            raise InvalidRequestError("n", self.n, "1: a response is one")
        turns = [ChatTurn("system", self.instructions)] if self.instructions else []
        turns += [ChatTurn("user", self.input)] if isinstance(self.input, str) else _turns(_resolved(self.input, find))
        return Conversation(
            tuple(turns),
            self._tools(),
            template_arguments=self.chat_template_kwargs or {},
            reasoning_effort=self.reasoning.effort if self.reasoning is not None else None,
            ignores_unknown=ignores_unknown(),
        )

    def _tools(self) -> Tools | None:
        choice, is_parallel = self.tool_choice, self.parallel_tool_calls
        definitions = tuple(tool.definition_by(tool.parameters) for tool in self.tools or ())
        if isinstance(choice, ChosenTool):
            return chosen_tools(definitions, is_parallel, name=choice.name)
        if isinstance(choice, AllowedToolsChoice):
            allowed = frozenset(each.name for each in choice.tools)
            return chosen_tools(definitions, is_parallel, choice.mode, allowed=allowed)
        return chosen_tools(definitions, is_parallel, choice)


def _resolved(items: list[InputItem], find: FindItem) -> list[InputItem]:
    """The items, with what they refer to in place of references."""
    found = []
    for index, item in enumerate(items):
        if item.type == "item_reference":
            known = find(item.id) if isinstance(item.id, str) else None
            if known is None:
                raise InvalidRequestError(f"input[{index}].id", item.id, _REFERABLE)
            item = InputItem.model_validate(known)
        found.append(item)
    return found


def _turns(items: list[InputItem]) -> Iterator[ChatTurn]:
    """One turn of the assistant for each run of what it thought, said and called."""
    thoughts: list[str] = []
    said: list[str] = []
    calls: list[ToolCall] = []

    def ended() -> Iterator[ChatTurn]:
        if thoughts or said or calls:
            yield ChatTurn("assistant", "\n".join(said), tuple(calls), reasoning="\n".join(thoughts))
        thoughts.clear()
        said.clear()
        calls.clear()

    for index, item in enumerate(items):
        where = f"input[{index}]"
        is_said = item.type == "message" and item.role == "assistant"
        if (is_said and calls) or not (is_said or item.type in ("reasoning", "function_call")):
            yield from ended()
        if item.type == "reasoning":
            thoughts += filter(None, [_shown(item.content or item.summary)])
        elif item.type == "function_call":
            if not item.name:
                raise InvalidRequestError(f"{where}.name", item.name, "the name of the function")
            calls.append(ToolCall(item.call_id or "", item.name, item.arguments or ""))
        elif item.type == "function_call_output":
            if not item.call_id:
                raise InvalidRequestError(f"{where}.call_id", item.call_id, "the id of the call that is answered")
            yield ChatTurn("tool", _shown(item.output), tool_call_id=item.call_id)
        elif is_said:
            said.append(_shown(item.content))
        elif item.role is None or item.content is None:
            missing = "role" if item.role is None else "content"
            raise InvalidRequestError(f"{where}.{missing}", None, "set in a message")
        else:
            yield ChatTurn(item.role, _shown(item.content))
    yield from ended()


def _shown(content: str | list[ContentPart] | None) -> str:
    return content if isinstance(content, str) else "\n".join(part.shown for part in content or ())
