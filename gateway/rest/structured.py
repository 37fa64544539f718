"""Structured output: what a request says about the form of its answer, as one grammar."""

from __future__ import annotations

import json
import re
from typing import Annotated, Any, Literal

from pydantic import Field

from easyspec.errors import InvalidRequestError
from easyspec.speculation.parameters import Grammar, GrammarKind
from gateway.rest.fields import Boolean, ListOf, RestModel, Text, unsupported

_ANY_OBJECT = '{"type": "object"}'
_REGEX_SPECIAL = re.compile(r"[\\.+*?()|\[\]{}^$#&\-~]")


class JsonSchemaFormat(RestModel):
    """`response_format.json_schema`."""

    name: Text | None = Field(None, description="Accepted; has no effect.")
    description: Text | None = Field(None, description="Accepted; has no effect.")
    schema_: dict[str, Any] | None = Field(None, alias="schema", description="Unset: any JSON object.")
    strict: Boolean | None = Field(None, description="True: refuse a schema that cannot be enforced whole.")


class ResponseFormat(RestModel):
    """`response_format`."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None


class StructuredOutputs(RestModel):
    """vLLM's `structured_outputs`; exactly one is set."""

    json_: dict[str, Any] | Text | None = Field(None, alias="json")
    regex: Text | None = None
    choice: ListOf[Text] | None = Field(None, min_length=1, max_length=1024)
    grammar: Text | None = None
    json_object: Boolean | None = None
    structural_tag: Annotated[None, unsupported("use tools")] = None

    def grammars(self) -> list[tuple[str, Grammar | None]]:
        return [
            ("structured_outputs.json", json_grammar(self.json_)),
            ("structured_outputs.json_object", json_grammar(_ANY_OBJECT if self.json_object else None)),
            ("structured_outputs.regex", _text(GrammarKind.REGEX, self.regex)),
            ("structured_outputs.choice", _choice(self.choice)),
            ("structured_outputs.grammar", _text(GrammarKind.LARK, self.grammar)),
        ]


class StructuredFields(RestModel):
    """The fields that constrain the output; at most one of them may be set."""

    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: dict[str, Any] | Text | None = Field(None, description="A JSON Schema.")
    guided_regex: Text | None = Field(None, description="Rust's syntax, without look-around.")
    guided_choice: ListOf[Text] | None = Field(None, min_length=1, max_length=1024, description="One of these texts.")
    guided_grammar: Text | None = Field(None, description="llguidance's dialect of Lark.")

    @property
    def is_strict(self) -> bool:
        """Whether every keyword of the schema must be enforced."""
        return any(form is not None and form.strict for _, _, form in self.forms())

    def forms(self) -> list[tuple[str, str, JsonSchemaFormat | None]]:
        """The fields that are set of those with a type and, perhaps, a schema."""
        form = self.response_format
        return [("response_format", form.type, form.json_schema)] if form is not None else []

    def found_grammars(self) -> list[tuple[str, Grammar | None]]:
        """What every field that can say so says about the form of the output."""
        return [
            *((name, grammar_of_format(kind, form)) for name, kind, form in self.forms()),
            *(self.structured_outputs.grammars() if self.structured_outputs is not None else []),
            ("guided_json", json_grammar(self.guided_json)),
            ("guided_regex", _text(GrammarKind.REGEX, self.guided_regex)),
            ("guided_choice", _choice(self.guided_choice)),
            ("guided_grammar", _text(GrammarKind.LARK, self.guided_grammar)),
        ]

    def given_grammar(self) -> tuple[str, Grammar | None]:
        """The field that says what the output must match, and what it must; InvalidRequestError if several do."""
        given = [(name, grammar) for name, grammar in self.found_grammars() if grammar is not None]
        if len(given) > 1:
            raise InvalidRequestError(given[1][0], "set", f"unset together with {given[0][0]}")
        return given[0] if given else ("", None)


def grammar_of_format(kind: str, form: JsonSchemaFormat | None) -> Grammar | None:
    """`form` goes with the kind json_schema."""
    if kind == "text":
        return None
    if kind == "json_object":
        return json_grammar(_ANY_OBJECT)
    if form is None:
        raise InvalidRequestError("response_format.json_schema", None, "an object with a schema")
    return json_grammar(_ANY_OBJECT if form.schema_ is None else form.schema_)


def json_grammar(schema: dict[str, Any] | str | None) -> Grammar | None:
    if schema is None:
        return None
    text = schema if isinstance(schema, str) else json.dumps(schema, ensure_ascii=False)
    return Grammar(GrammarKind.JSON_SCHEMA, text)


def _text(kind: GrammarKind, text: str | None) -> Grammar | None:
    return None if text is None else Grammar(kind, text)


def _choice(texts: list[str] | None) -> Grammar | None:
    if texts is None:
        return None
    return Grammar(GrammarKind.REGEX, "|".join(_REGEX_SPECIAL.sub(r"\\\g<0>", text) for text in texts))
