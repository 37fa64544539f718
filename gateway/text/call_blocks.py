"""Tool calls that are not plain JSON objects: each is given out when it is complete.

As with JSON calls, what looked like a call and turns out to be none is given back as speech.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from gateway.text.text_marks import overlap
from gateway.text.tool_parser import ParsedText, Part, ToolCallDelta

# (name, arguments as JSON) of each call of a block; None if it holds anything else.
ReadBlock: TypeAlias = Callable[[str], "list[tuple[str, str]] | None"]

_FUNCTION = re.compile(r"\s*<function=([^>\s]+)>(.*?)</function>\s*", re.DOTALL)
_PARAMETER = re.compile(r"\s*<parameter=([^>\s]+)>\n?(.*?)\n?</parameter>\s*", re.DOTALL)
_MISTRAL_CALL = re.compile(r"\s*([\w.-]+)\s*(?:\[CALL_ID\]\s*[\w-]+\s*)?(?:\[ARGS\])?\s*(?=\{)")
_PYTHONIC_BEGINNING = re.compile(r"\[\s*([A-Za-z_][\w.]*\s*(\(.*)?)?", re.DOTALL)


@dataclass(frozen=True)
class Block:
    """Where calls stand: between `opening` and `closing`. Without a closing mark `ends` says where one is over: the
    number of characters of a block that is complete, None if it is not yet."""

    opening: str
    closing: str = ""
    ends: Callable[[str], int | None] = lambda text: None


class BlockCallParser:
    """Takes an answer piece by piece; the interface of `ToolCallParser`."""

    def __init__(
        self,
        block: Block,
        read: ReadBlock,
        names: frozenset[str],
        max_calls: int | None,
        new_id: Callable[[], str],
    ) -> None:
        self._block = block
        self._read = read
        self._names = names
        self._max_calls = max_calls
        self._new_id = new_id
        self._pending = ""
        self._framing: str | None = None  # what stands before the open block's text, if one is open
        self.num_calls = 0

    @property
    def is_finished(self) -> bool:
        return self._max_calls is not None and self.num_calls >= self._max_calls

    def push(self, text: str) -> ParsedText:
        """What became certain with `text`."""
        self._pending += text
        taken: list[Part] = []
        while not self.is_finished and (self._speak(taken) if self._framing is None else self._take_block(taken)):
            pass
        return ParsedText(tuple(taken))

    def flush(self) -> ParsedText:
        """The rest, when nothing more comes: a block may do without its closing mark."""
        taken: list[Part] = []
        if self._framing is not None:
            self._finish_block(self._pending, "", taken)
        elif self._pending.strip() or not self.num_calls:
            taken.append(self._pending)
        self._pending = ""
        return ParsedText(tuple(taken))

    def _speak(self, taken: list[Part]) -> bool:
        """Speech up to an opening mark; True if one was found."""
        before, mark, after = self._pending.partition(self._block.opening)
        certain = before if mark else before[: len(before) - overlap(before, self._block.opening)]
        # White space before a call is layout.
        certain = certain.rstrip()
        taken.append(certain)
        if not mark:
            self._pending = before[len(certain) :]
            return False
        self._framing, self._pending = before[len(certain) :] + mark, after
        return True

    def _take_block(self, taken: list[Part]) -> bool:
        closing = self._block.closing
        if closing:
            body, mark, rest = self._pending.partition(closing)
            if not mark:
                return False
        else:
            end = self._block.ends(self._pending)
            if end is None:
                return False
            body, mark, rest = self._pending[:end], "", self._pending[end:]
        self._pending = rest
        self._finish_block(body, mark, taken)
        return True

    def _finish_block(self, body: str, mark: str, taken: list[Part]) -> None:
        framing, self._framing = self._framing or "", None
        found = self._read(body)
        if not found or not all(name in self._names for name, _ in found):
            taken.append(f"{framing}{body}{mark}")
            return
        for name, arguments in found:
            if not self.is_finished:
                taken.append(ToolCallDelta(self.num_calls, arguments, self._new_id(), name))
                self.num_calls += 1


class PythonicCallParser:
    """Calls as a Python list, `[f(a=1), g()]`, which is the whole answer; the interface of `ToolCallParser`."""

    _MARKS = ("<|python_start|>", "<|python_tag|>")

    def __init__(self, names: frozenset[str], max_calls: int | None, new_id: Callable[[], str]) -> None:
        self._names = names
        self._max_calls = max_calls
        self._new_id = new_id
        self._pending = ""
        self._is_speech = False
        self.num_calls = 0

    @property
    def is_finished(self) -> bool:
        return self._max_calls is not None and self.num_calls >= self._max_calls

    def push(self, text: str) -> ParsedText:
        """What became certain with `text`: nothing while it may still be calls."""
        self._pending += text
        if not self._is_speech and self._may_be_calls():
            return ParsedText()
        self._is_speech = True
        said, self._pending = self._pending, ""
        return ParsedText((said,))

    def flush(self) -> ParsedText:
        text, self._pending = self._pending, ""
        found = None if self._is_speech else pythonic_calls(self._unmarked(text).removesuffix("<|python_end|>"))
        if not found or not all(name in self._names for name, _ in found):
            return ParsedText((text,))
        found = found[: self._max_calls]
        self.num_calls = len(found)
        return ParsedText(
            tuple(ToolCallDelta(i, arguments, self._new_id(), name) for i, (name, arguments) in enumerate(found))
        )

    def _may_be_calls(self) -> bool:
        text = self._pending.lstrip()
        if any(mark.startswith(text) for mark in self._MARKS):
            return True
        return not (text := self._unmarked(text)) or _PYTHONIC_BEGINNING.fullmatch(text) is not None

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
    return None if start is None else _json_end(text, start.start())


def _json_end(text: str, start: int) -> int | None:
    """Where the object or list that begins at `start` ends; None if it does not yet."""
    depth, is_in_string, is_escaped = 0, False, False
    for index in range(start, len(text)):
        char = text[index]
        if is_in_string:
            is_in_string = is_escaped or char != '"'
            is_escaped = char == "\\" and not is_escaped
        elif char == '"':
            is_in_string = True
        elif char in "{[":
            depth += 1
        elif char in "}]":
            depth -= 1
            if depth == 0:
                return index + 1
    return None


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
