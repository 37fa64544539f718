"""Tool calls that are not plain JSON objects: each is given out when it is complete. As with JSON calls, what looked
like a call and turns out to be none is given back as speech."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

from gateway.text.tool_parser import CallObject, CallParser, Part

# (name, arguments as JSON) of each call of a block; None if it holds anything else.
ReadBlock: TypeAlias = Callable[[str], "list[tuple[str, str]] | None"]

_FUNCTION = re.compile(r"\s*<function=([^>\s]+)>(.*?)</function>\s*(?:</tool_call>)?", re.DOTALL)
_PARAMETER = re.compile(r"\s*<parameter=([^>\s]+)>\n?(.*?)\n?</parameter>\s*", re.DOTALL)
_MISTRAL_CALL = re.compile(r"\s*([\w.-]+)\s*(?:\[CALL_ID\]\s*[\w-]+\s*)?(?:\[ARGS\])?\s*(?=\{)")
_PYTHONIC_BEGINNING = re.compile(r"\[\s*([A-Za-z_][\w.]*\s*(\(.*)?)?", re.DOTALL)


class BlockCallParser(CallParser):
    """Calls in blocks, each of which is read when it is complete. `opening` stands before a block; `ends` tells the
    length of one that is complete, None if it is not yet."""

    def __init__(
        self,
        opening: str,
        ends: Callable[[str], int | None],
        read: ReadBlock,
        names: frozenset[str],
        max_calls: int | None,
        new_id: Callable[[], str],
    ) -> None:
        super().__init__(names, max_calls, new_id)
        self._opening = opening
        self._ends = ends
        self._read = read
        self._framing: str | None = None  # what stands before the open block's text, if one is open

    def step(self, taken: list[Part]) -> bool:
        if self._framing is None:
            self._framing = self._speak(self._opening, taken)
            return self._framing is not None
        end = self._ends(self._pending)
        if end is None:
            return False
        block, self._pending = self._pending[:end], self._pending[end:]
        self._take_calls(self._read(block), self._framing + block, taken)
        self._framing = None
        return True

    def finish(self, taken: list[Part]) -> None:
        """A block may do without its closing mark."""
        if self._framing is not None:
            self._take_calls(self._read(self._pending), self._framing + self._pending, taken)
        elif self._pending.strip() or not self.num_calls:
            taken.append(self._pending)


class PythonicCallParser(CallParser):
    """Calls as a Python list, `[f(a=1), g()]`, which is the whole answer."""

    _MARKS = ("<|python_start|>", "<|python_tag|>")

    def __init__(self, names: frozenset[str], max_calls: int | None, new_id: Callable[[], str]) -> None:
        super().__init__(names, max_calls, new_id)
        self._is_speech = False

    def step(self, taken: list[Part]) -> bool:
        begun, text = self._pending.lstrip(), self._unmarked(self._pending)
        may_be_calls = (
            any(mark.startswith(begun) for mark in self._MARKS) or not text or _PYTHONIC_BEGINNING.fullmatch(text)
        )
        if self._is_speech or not may_be_calls:
            self._is_speech = True
            taken.append(self._pending)
            self._pending = ""
        return False

    def finish(self, taken: list[Part]) -> None:
        text = self._unmarked(self._pending).removesuffix("<|python_end|>")
        self._take_calls(None if self._is_speech else pythonic_calls(text), self._pending, taken)

    def _unmarked(self, text: str) -> str:
        text = text.strip()
        for mark in self._MARKS:
            text = text.removeprefix(mark).lstrip()
        return text


def xml_calls(tools: Mapping[str, Mapping[str, Any]]) -> ReadBlock:
    """Reads `<function=NAME><parameter=P>VALUE</parameter>...</function>`; `tools` are schemas by the functions' names,
    which tell what is a text and what is JSON."""

    def read(body: str) -> list[tuple[str, str]] | None:
        found = _FUNCTION.fullmatch(body)
        if found is None:
            return None
        name, inside = found.groups()
        if _PARAMETER.sub("", inside).strip():
            return None
        properties = tools.get(name, {}).get("properties", {})
        arguments = {one: _typed(value, properties.get(one)) for one, value in _PARAMETER.findall(inside)}
        return [(name, json.dumps(arguments, ensure_ascii=False))]

    return read


def xml_end(text: str) -> int | None:
    """Where a block after <tool_call> is over: behind its closing mark."""
    before, mark, _ = text.partition("</tool_call>")
    return len(before + mark) if mark else None


def _typed(value: str, schema: Any) -> Any:
    """A parameter's value by its schema: a text as it stands, anything else as JSON if it is some."""
    kind = schema.get("type") if isinstance(schema, dict) else None
    if kind == "string":
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return {"True": True, "False": False, "None": None}.get(value.strip(), value)


def mistral_calls(body: str) -> list[tuple[str, str]] | None:
    """Reads one call: `NAME[ARGS]{...}`, with a [CALL_ID] or without marks; or a list of JSON objects."""
    found = _MISTRAL_CALL.match(body)
    try:
        if found is not None:
            arguments = body[found.end() :].strip()
            return [(found.group(1), arguments)] if isinstance(json.loads(arguments), dict) else None
        calls = json.loads(body)
        calls = [calls] if isinstance(calls, dict) else calls
        return [(call["name"], json.dumps(call.get("arguments", {}), ensure_ascii=False)) for call in calls]
    except (ValueError, RecursionError, TypeError, KeyError, AttributeError):
        return None


def mistral_end(text: str) -> int | None:
    """Where a block after [TOOL_CALLS] is over: at the end of its object or list."""
    start = re.search(r"[\[{]", re.sub(r"\[(CALL_ID|ARGS)\]", lambda found: "_" * len(found.group()), text))
    if start is None:
        return None
    found = CallObject()
    rest = found.take(text[start.start() :])
    return len(text) - len(rest) if found.is_complete else None


def pythonic_calls(text: str) -> list[tuple[str, str]] | None:
    """Reads `[f(a=1, b="x"), g()]`: literals alone, by name."""
    try:
        tree = ast.parse(text.strip(), mode="eval").body
        calls: Sequence[ast.expr] = tree.elts if isinstance(tree, ast.List) else [tree]
        return [_pythonic_call(call) for call in calls] or None
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError):
        return None


def _pythonic_call(call: ast.expr) -> tuple[str, str]:
    if not isinstance(call, ast.Call) or call.args:
        raise ValueError("not a call by names")
    arguments = {}
    for keyword in call.keywords:
        if keyword.arg is None:
            raise ValueError("not a name")
        arguments[keyword.arg] = _literal(keyword.value)
    return ast.unparse(call.func), json.dumps(arguments, ensure_ascii=False)


def _literal(value: ast.expr) -> Any:
    """A literal; JSON's names for true, false and null are taken as well."""
    names = {"true": True, "false": False, "null": None}
    if isinstance(value, ast.Name) and value.id in names:
        return names[value.id]
    if isinstance(value, ast.List | ast.Tuple):
        return [_literal(one) for one in value.elts]
    if isinstance(value, ast.Dict):
        return {
            str(ast.literal_eval(key)): _literal(one)
            for key, one in zip(value.keys, value.values, strict=True)
            if key is not None
        }
    return ast.literal_eval(value)
