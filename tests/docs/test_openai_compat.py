"""docs/openai-compat.md says what the code does, field by field, and leaves out none that OpenAI's client has."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from openai.types import completion_create_params as openai_completion
from openai.types.chat import completion_create_params as openai_chat
from openai.types.responses import response_create_params as openai_responses
from pydantic import BaseModel, TypeAdapter, ValidationError

from gateway.rest.chat_request import ChatRequest, FunctionDefinition, Message
from gateway.rest.completions import CompletionRequest
from gateway.rest.fields import SpeculationFields
from gateway.rest.generation_fields import GenerationFields, StreamOptions
from gateway.rest.messages_request import MessagesRequest
from gateway.rest.responses_request import ResponsesRequest
from gateway.rest.structured import JsonSchemaFormat, ResponseFormat, StructuredOutputs
from gateway.rest.tokenize import DetokenizeRequest, TokenizeRequest

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "openai-compat.md"
# The models behind each section; fields of the second are told elsewhere.
SECTIONS: dict[str, tuple[type[BaseModel], type[BaseModel] | None]] = {
    "Requests for text": (GenerationFields, None),
    "Chat completions": (ChatRequest, GenerationFields),
    "Completions": (CompletionRequest, GenerationFields),
    "Message": (Message, None),
    "Function": (FunctionDefinition, None),
    "stream_options": (StreamOptions, None),
    "speculation": (SpeculationFields, None),
    "structured_outputs": (StructuredOutputs, None),
    "response_format": (ResponseFormat, None),
    "json_schema": (JsonSchemaFormat, None),
    "Responses": (ResponsesRequest, GenerationFields),
    "Messages": (MessagesRequest, GenerationFields),
    "Tokenize": (TokenizeRequest, None),
    "Detokenize": (DetokenizeRequest, None),
}


def documented(title: str) -> dict[str, str]:
    """The status of each field in the table of a section."""
    text = DOCUMENT.read_text(encoding="utf-8")
    (section,) = re.findall(rf"^##+ {re.escape(title)}\n(.*?)(?=^##|\Z)", text, re.DOTALL | re.MULTILINE)
    rows = re.findall(r"^\| `(\w+)` \| (\w+) \| (.+) \|$", section, re.MULTILINE)
    assert len({name for name, *_ in rows}) == len(rows)
    return {name: status for name, status, _ in rows}


def status_of(model: type[BaseModel], name: str) -> str:
    info = model.model_fields[name]
    try:
        # What is refused is refused whatever the value, and in so many words.
        TypeAdapter(model).validate_python({info.alias or name: object()})
    except ValidationError as error:
        problems = [one for one in error.errors() if one["loc"] == (info.alias or name,)]
        if any(one["type"] == "unsupported_parameter" for one in problems):
            assert "not supported: " in problems[0]["msg"]
            return "refused"
    return "accepted" if (info.description or "").startswith("Accepted") else "supported"


@pytest.mark.parametrize("title", SECTIONS)
def test_every_field_has_its_row_and_every_row_its_field(title: str) -> None:
    model, elsewhere = SECTIONS[title]
    names = [name for name in model.model_fields if elsewhere is None or name not in elsewhere.model_fields]
    told = {model.model_fields[name].alias or name: status_of(model, name) for name in names}
    assert documented(title) == told


@pytest.mark.parametrize(
    ("params", "title"),
    [
        (openai_chat.CompletionCreateParamsBase, "Chat completions"),
        (openai_completion.CompletionCreateParamsBase, "Completions"),
        (openai_responses.ResponseCreateParamsBase, "Responses"),
    ],
)
def test_no_field_of_openais_client_is_left_out(params: Any, title: str) -> None:
    told = documented("Requests for text") | documented(title)
    assert set(params.__annotations__) - set(told) == set()


def test_no_row_promises_a_section_that_is_not_tested() -> None:
    titles = re.findall(r"^##+ (.+)$", DOCUMENT.read_text(encoding="utf-8"), re.MULTILINE)
    assert set(SECTIONS) | {"JSON Schemas", "Other routes", "Replies", "Errors"} == set(titles)
