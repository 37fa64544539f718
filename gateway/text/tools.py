"""How a family of models is told about tools and writes calls, and how a call is forced."""

from __future__ import annotations

import enum
import json
import secrets
import string
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from easyspec.errors import InvalidRequestError
from easyspec.speculation.parameters import Grammar, GrammarKind
from easyspec.speculation.schema_references import with_plain_references
from easyspec.speculation.schemas import JSON_WHITE_SPACE
from gateway.text.call_blocks import BlockCallParser, PythonicCallParser, mistral_calls, mistral_end, xml_calls, xml_end
from gateway.text.conversation import Tools
from gateway.text.harmony import MARKS as HARMONY_MARKS
from gateway.text.harmony import HarmonyParser
from gateway.text.tool_parser import CallParser, Frame, ToolCallParser

_MISTRAL_ID_CHARS = string.ascii_letters + string.digits


class ToolDialect(enum.Enum):
    """How calls are written."""

    HERMES = "hermes"  # <tool_call>{...}</tool_call>: Hermes, Qwen, the bundled pair
    LLAMA3_JSON = "llama3_json"  # the whole answer is {...}; {...}
    MISTRAL = "mistral"  # [TOOL_CALLS] [{...}, ...]
    MISTRAL_ARGS = "mistral_args"  # [TOOL_CALLS]name[ARGS]{...}: from its eleventh tokenizer on
    QWEN3_CODER = "qwen3_coder"  # <tool_call><function=name><parameter=p>...</parameter></function></tool_call>
    PYTHONIC = "pythonic"  # the whole answer is [name(p=...), ...]: Llama 3.2 and 4
    HARMONY = "harmony"  # messages to channels: gpt-oss
    NONE = "none"  # not at all: only forced calls are found


_FRAMES: Mapping[ToolDialect, Frame] = {
    ToolDialect.HERMES: Frame("<tool_call>", "</tool_call>"),
    ToolDialect.LLAMA3_JSON: Frame(prefix="<|python_tag|>"),
    ToolDialect.MISTRAL: Frame("[TOOL_CALLS]", "]"),
}
_MARKS: Mapping[ToolDialect, tuple[str, ...]] = {
    ToolDialect.HARMONY: HARMONY_MARKS,
    ToolDialect.MISTRAL_ARGS: ("[TOOL_CALLS]", "[CALL_ID]", "[ARGS]"),
    ToolDialect.QWEN3_CODER: ("<tool_call>", "</tool_call>"),
    ToolDialect.PYTHONIC: ("<|python_start|>", "<|python_end|>", "<|python_tag|>"),
}
_MARKED_FIRST = (ToolDialect.HERMES, ToolDialect.QWEN3_CODER, ToolDialect.MISTRAL, ToolDialect.MISTRAL_ARGS)
# Options of the grammar library: white space as models were trained on it, and none to get lost in.
_COMPACT = {"whitespace_flexible": False, "whitespace_pattern": None, "item_separator": ", ", "key_separator": ": "}


# What a template has of each dialect, the more telling first.
_TRACES = (
    ("<|channel|>", ToolDialect.HARMONY),
    ("[ARGS]", ToolDialect.MISTRAL_ARGS),
    ("[TOOL_CALLS]", ToolDialect.MISTRAL),
    ("<parameter=", ToolDialect.QWEN3_CODER),
    ("<tool_call>", ToolDialect.HERMES),
    ("<|python_start|>", ToolDialect.PYTHONIC),
    ("[func_name1(", ToolDialect.PYTHONIC),
    ("tools", ToolDialect.LLAMA3_JSON),
)


def dialect_of(chat_template: str) -> ToolDialect:
    """The dialect that a chat template teaches; NONE if it knows no tools."""
    if "tools" not in chat_template:
        return ToolDialect.NONE
    return next(dialect for trace, dialect in _TRACES if trace in chat_template)


def marks_of(dialect: ToolDialect) -> tuple[str, ...]:
    """Texts that stand around calls; they must be seen even where the tokenizer has special tokens for them."""
    if dialect in _MARKS:
        return _MARKS[dialect]
    frame = _FRAMES.get(dialect, Frame())
    return tuple(mark for mark in (frame.opening, frame.closing, frame.prefix) if len(mark) > 1)


def parser_for(tools: Tools | None, dialect: ToolDialect) -> CallParser | None:
    """A parser for the answer to a request with `tools`; None if no call is to be looked for."""
    definitions = tools.callable_definitions if tools is not None else ()
    names = frozenset(tool.name for tool in definitions)
    is_forced = tools is not None and tools.is_forced
    most = None if tools is None or tools.is_parallel else 1
    if dialect is ToolDialect.HARMONY and not is_forced:
        return HarmonyParser(names, most, _openai_id)
    if not names or (dialect is ToolDialect.NONE and not is_forced):
        return None
    new_id = _mistral_id if dialect in (ToolDialect.MISTRAL, ToolDialect.MISTRAL_ARGS) else _openai_id
    if is_forced:
        return ToolCallParser(Frame(closing="]"), names, most, new_id)
    if dialect is ToolDialect.PYTHONIC:
        return PythonicCallParser(names, most, new_id)
    if dialect is ToolDialect.MISTRAL_ARGS:
        return BlockCallParser("[TOOL_CALLS]", mistral_end, mistral_calls, names, most, new_id)
    if dialect is ToolDialect.QWEN3_CODER:
        read = xml_calls({tool.name: tool.schema for tool in definitions})
        return BlockCallParser("<tool_call>", xml_end, read, names, most, new_id)
    return ToolCallParser(_FRAMES[dialect], names, most, new_id)


def forced_grammar(tools: Tools, dialect: ToolDialect) -> Grammar:
    """What an answer must match that consists of calls and nothing else: one object, or a list of them. Every
    function's own schema is put beside the others under `$defs`, and its references are led there."""
    key = "parameters" if dialect is ToolDialect.LLAMA3_JSON else "arguments"
    functions = tools.callable_definitions
    try:
        schemas: dict[str, Any] = {
            tool.name: _rerooted(with_plain_references(tool.schema), f"#/$defs/{tool.name}") for tool in functions
        }
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


def answer_or_calls(answer: Grammar, dialect: ToolDialect, in_lark: Callable[[str], str]) -> Grammar:
    """What an answer must match that is `answer`, a JSON Schema, or calls, which are as free as they are without one.
    `in_lark` tells what a mark is called in a grammar. Of dialects whose calls may begin like an answer: the answer."""
    if dialect not in _MARKED_FIRST:
        return answer
    schema = json.loads(answer.text)
    if isinstance(schema, dict):
        schema = {"x-guidance": {"whitespace_pattern": JSON_WHITE_SPACE}, **schema}
    opening, *_ = marks = [in_lark(mark) for mark in marks_of(dialect)]
    lark = (
        "start: answer | calls\n"
        f"answer: %json {json.dumps(schema, ensure_ascii=False)}\n"
        f"calls: BLANK {opening} (/(.|\\n)+/ | {' | '.join(marks)})*\n"
        "BLANK: /[ \\n]{0,8}/"
    )
    return replace(answer, kind=GrammarKind.LARK, text=lark)


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
        if reference != "#" and not reference.startswith("#/"):
            raise InvalidRequestError("tools.parameters.$ref", reference, "references within the schema")
        moved["$ref"] = root + reference[1:]
    return moved


def _openai_id() -> str:
    return f"call_{secrets.token_hex(12)}"


def _mistral_id() -> str:
    # Mistral's templates refuse ids of any other form.
    return "".join(secrets.choice(_MISTRAL_ID_CHARS) for _ in range(9))
