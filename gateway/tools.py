"""How a family of models is told about tools and writes calls, and how a call is forced."""

from __future__ import annotations

import enum
import json
import secrets
import string
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from easyspec.errors import InvalidRequestError
from easyspec.speculation.parameters import Grammar, GrammarKind
from gateway.conversation import Tools
from gateway.tool_parser import Frame, ToolCallParser

_MISTRAL_ID_CHARS = string.ascii_letters + string.digits


class ToolDialect(enum.Enum):
    """How calls are written."""

    HERMES = "hermes"  # <tool_call>{...}</tool_call>: Hermes, Qwen, the bundled pair
    LLAMA3_JSON = "llama3_json"  # the whole answer is {...}; {...}
    MISTRAL = "mistral"  # [TOOL_CALLS] [{...}, ...]
    NONE = "none"  # not at all: only forced calls are found


_FRAMES: Mapping[ToolDialect, Frame] = MappingProxyType(
    {
        ToolDialect.HERMES: Frame("<tool_call>", "</tool_call>"),
        ToolDialect.LLAMA3_JSON: Frame(prefix="<|python_tag|>"),
        ToolDialect.MISTRAL: Frame("[TOOL_CALLS]", "]"),
    }
)
_FORCED = Frame(closing="]")
# Options of the grammar library: white space as models were trained on it, and none to get lost in.
_COMPACT: Mapping[str, Any] = MappingProxyType(
    {"whitespace_flexible": False, "whitespace_pattern": None, "item_separator": ", ", "key_separator": ": "}
)


def dialect_of(chat_template: str) -> ToolDialect:
    """The dialect that a chat template teaches; NONE if it knows no tools."""
    if "tools" not in chat_template:
        return ToolDialect.NONE
    if "[TOOL_CALLS]" in chat_template:
        return ToolDialect.MISTRAL
    if "<tool_call>" in chat_template:
        return ToolDialect.HERMES
    return ToolDialect.LLAMA3_JSON


def marks_of(dialect: ToolDialect) -> tuple[str, ...]:
    """Texts that stand around calls; they must be seen even where the tokenizer has special tokens for them."""
    frame = _FRAMES.get(dialect, Frame())
    return tuple(mark for mark in (frame.opening, frame.closing, frame.prefix) if len(mark) > 1)


def parser_for(tools: Tools, dialect: ToolDialect) -> ToolCallParser | None:
    """A parser for the answer to a request with `tools`; None if no call is to be looked for."""
    names = frozenset(tool.name for tool in tools.callable_definitions)
    if not names or (dialect is ToolDialect.NONE and not tools.is_forced):
        return None
    frame = _FORCED if tools.is_forced else _FRAMES[dialect]
    new_id = _mistral_id if dialect is ToolDialect.MISTRAL else _openai_id
    return ToolCallParser(frame, names, None if tools.is_parallel else 1, new_id)


def forced_grammar(tools: Tools, dialect: ToolDialect) -> Grammar:
    """What an answer must match that consists of calls and nothing else: one object, or a list of them.

    Every function's own schema is put beside the others under `$defs`, and its references are led there.
    """
    key = "parameters" if dialect is ToolDialect.LLAMA3_JSON else "arguments"
    functions = tools.callable_definitions
    try:
        schemas: dict[str, Any] = {tool.name: _rerooted(tool.schema, f"#/$defs/{tool.name}") for tool in functions}
    except RecursionError:
        raise InvalidRequestError("tools.parameters", "a schema", "fewer levels of nesting") from None
    calls = [
        {
            "type": "object",
            "properties": {"name": {"const": tool.name}, key: {"$ref": f"#/$defs/{tool.name}"}},
            "required": ["name", key],
            "additionalProperties": False,
        }
        for tool in functions
    ]
    call: dict[str, Any] = calls[0] if len(calls) == 1 else {"anyOf": calls}
    if tools.is_parallel and not tools.name:
        call = {"type": "array", "items": call, "minItems": 1}
    schema = {**call, "$defs": schemas, "x-guidance": dict(_COMPACT)}
    return Grammar(GrammarKind.JSON_SCHEMA, json.dumps(schema, ensure_ascii=False))


def _rerooted(schema: Any, root: str) -> Any:
    """The schema with references to its own root (`#`, `#/...`) pointing to `root` instead."""
    if isinstance(schema, list):
        return [_rerooted(part, root) for part in schema]
    if not isinstance(schema, dict):
        return schema
    # Identifiers would give the references inside another base.
    left_out = {name for name in ("$schema", "$id") if isinstance(schema.get(name), str)}
    moved = {name: _rerooted(part, root) for name, part in schema.items() if name not in left_out}
    reference = schema.get("$ref")
    if isinstance(reference, str):
        if not reference.startswith("#"):
            raise InvalidRequestError("tools.parameters.$ref", reference, "references within the schema")
        moved["$ref"] = root + reference[1:]
    return moved


def _openai_id() -> str:
    return f"call_{secrets.token_hex(12)}"


def _mistral_id() -> str:
    # Mistral's templates refuse ids of any other form.
    return "".join(secrets.choice(_MISTRAL_ID_CHARS) for _ in range(9))
