"""Every field that the official clients have types for, inside messages, items and tools too, is known here."""

from __future__ import annotations

from typing import Any, get_args

import pytest
from anthropic import types as claude
from openai.types import chat, responses, shared_params
from openai.types.chat import chat_completion_message_function_tool_call_param as chat_call
from openai.types.responses import response_input_param

from gateway.rest import messages_request, responses_request
from gateway.rest.chat_request import ChatTool, FunctionDefinition, Message, TextPart
from gateway.rest.fields import RestModel
from gateway.rest.generation_fields import StreamOptions

ITEM, PART = responses_request.InputItem, responses_request.ContentPart
BLOCK = messages_request.ContentBlock
# What clients may ask of tools, and how, that is not done here: refused by name as unknown.
NOT_DONE = frozenset({"allowed_callers", "async", "defer_loading", "mode", "output_schema"})


@pytest.mark.parametrize(
    ("params", "model"),
    [
        (chat.ChatCompletionAssistantMessageParam, Message),
        (chat.ChatCompletionUserMessageParam, Message),
        (chat.ChatCompletionToolMessageParam, Message),
        (chat.ChatCompletionSystemMessageParam, Message),
        (chat.ChatCompletionDeveloperMessageParam, Message),
        (chat.ChatCompletionContentPartTextParam, TextPart),
        (chat.ChatCompletionContentPartRefusalParam, TextPart),
        (chat.ChatCompletionFunctionToolParam, ChatTool),
        (shared_params.FunctionDefinition, FunctionDefinition),
        (chat.ChatCompletionStreamOptionsParam, StreamOptions),
        (responses.EasyInputMessageParam, ITEM),
        (response_input_param.Message, ITEM),
        (response_input_param.FunctionCallOutput, ITEM),
        (responses.ResponseInputTextParam, PART),
        (responses.FunctionToolParam, responses_request.ResponseTool),
        (responses.ResponseTextConfigParam, responses_request.TextFields),
        (responses.ResponseFormatTextJSONSchemaConfigParam, responses_request.TextFormat),
        (shared_params.Reasoning, responses_request.ReasoningFields),
        (claude.MessageParam, messages_request.AnthropicMessage),
        (claude.TextBlockParam, BLOCK),
        (claude.ToolResultBlockParam, BLOCK),
        (claude.ToolParam, messages_request.AnthropicTool),
        (claude.ToolChoiceAutoParam, messages_request.AnthropicToolChoice),
        (claude.ToolChoiceToolParam, messages_request.AnthropicToolChoice),
        (claude.ThinkingConfigEnabledParam, messages_request.ThinkingFields),
        (claude.OutputConfigParam, messages_request.OutputConfig),
    ],
)
def test_no_nested_field_is_left_out(params: Any, model: type[RestModel]) -> None:
    known = {info.alias or name for name, info in model.model_fields.items()}
    fields = {name for one in get_args(params) or (params,) for name in one.__annotations__}
    assert fields
    assert fields - known <= NOT_DONE


@pytest.mark.parametrize(
    ("params", "model", "values"),
    [
        (chat.ChatCompletionMessageFunctionToolCallParam, Message, {"role": "assistant"}),
        (chat_call.Function, Message, {"role": "assistant"}),
        (responses.ResponseOutputMessageParam, ITEM, {"role": "assistant"}),
        (responses.ResponseFunctionToolCallParam, ITEM, {"type": "function_call"}),
        (responses.ResponseReasoningItemParam, ITEM, {"type": "reasoning"}),
        (responses.ResponseOutputTextParam, PART, {"type": "output_text"}),
        (responses.ResponseOutputRefusalParam, PART, {"type": "refusal"}),
        (claude.ToolUseBlockParam, BLOCK, {"type": "tool_use"}),
        (claude.ThinkingBlockParam, BLOCK, {"type": "thinking"}),
        (claude.RedactedThinkingBlockParam, BLOCK, {"type": "redacted_thinking"}),
    ],
)
def test_what_a_server_wrote_may_have_any_field(params: Any, model: type[RestModel], values: dict[str, str]) -> None:
    known = {info.alias or name for name, info in model.model_fields.items()}
    unknown = dict.fromkeys({*params.__annotations__, "made_up"} - known, "x")
    assert unknown
    model.model_validate({**values, **unknown})
