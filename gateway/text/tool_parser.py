"""Tool calls in what a model writes, found while it is being written.

A frame says what stands around calls; inside it every call is a JSON object with a name and arguments (or parameters).
Speech before a call goes on streaming, and only what may be the beginning of a frame is held back. What looked like a
call and turns out to be none is given back as speech, so nothing the model wrote is ever lost.
"""

from __future__ import annotations

import enum
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

_SEPARATORS = frozenset(",;[ \t\r\n")
_HEAD = re.compile(
    r'\{\s*(?:"type"\s*:\s*"function"\s*,\s*)?"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"(?:arguments|parameters)"\s*:\s*'
)
# How an object that is a call begins, white space left out.
_BEGINNINGS = ('{"name":', '{"type":"function"')


def overlap(text: str, mark: str) -> int:
    """Length of the longest end of `text` that begins `mark` and is not all of it."""
    return next((n for n in range(min(len(text), len(mark) - 1), 0, -1) if mark.startswith(text[-n:])), 0)


@dataclass(frozen=True)
class ToolCallDelta:
    """A piece of call number `index`: the first piece carries id and name; the arguments of all pieces are joined."""

    index: int
    arguments: str
    id: str | None = None
    name: str | None = None


def joined(deltas: Iterable[ToolCallDelta]) -> list[ToolCallDelta]:
    """The same, with one piece for each call."""
    pieces: dict[int, ToolCallDelta] = {}
    for delta in deltas:
        before = pieces.get(delta.index)
        pieces[delta.index] = delta if before is None else replace(before, arguments=before.arguments + delta.arguments)
    return list(pieces.values())


@dataclass(frozen=True)
class Thought:
    """A piece of what is thought."""

    text: str


# A piece of an answer: what is said, thought or called.
Part: TypeAlias = str | Thought | ToolCallDelta


@dataclass(frozen=True)
class ParsedText:
    """What became certain with a piece of text, in the order in which it was written."""

    parts: tuple[Part, ...] = ()

    @property
    def text(self) -> str:
        return "".join(part for part in self.parts if isinstance(part, str))

    @property
    def calls(self) -> tuple[ToolCallDelta, ...]:
        return tuple(part for part in self.parts if isinstance(part, ToolCallDelta))

    @property
    def reasoning(self) -> str:
        return "".join(part.text for part in self.parts if isinstance(part, Thought))


class CallParser(ABC):
    """Finds calls in an answer that comes piece by piece. With `max_calls` it is over when so many are complete.
    `names` are the functions that exist, `new_id` makes an id for a call. `num_calls` counts calls given out."""

    def __init__(self, names: frozenset[str], max_calls: int | None, new_id: Callable[[], str]) -> None:
        self._names = names
        self._max_calls = max_calls
        self._new_id = new_id
        self._pending = ""  # taken and not decided
        self.num_calls = 0

    @property
    def is_finished(self) -> bool:
        return self._max_calls is not None and self.num_calls >= self._max_calls

    def push(self, text: str) -> ParsedText:
        """What became certain with `text`."""
        self._pending += text
        taken: list[Part] = []
        while not self.is_finished and self.step(taken):
            pass
        return ParsedText(tuple(taken))

    @abstractmethod
    def step(self, taken: list[Part]) -> bool:
        """Move what is certain from `_pending` to `taken`; True if there may be more."""

    @abstractmethod
    def finish(self, taken: list[Part]) -> None:
        """Move the rest to `taken`, when nothing more comes."""

    def flush(self) -> ParsedText:
        """The rest, when nothing more comes."""
        taken: list[Part] = []
        self.finish(taken)
        self._pending = ""
        return ParsedText(tuple(taken))

    def _take_calls(self, found: Sequence[tuple[str, str]] | None, text: str, taken: list[Part]) -> None:
        """Complete calls, as names and arguments; where they are none, the text that they were read from."""
        if not found or not all(name in self._names for name, _ in found):
            taken.append(text)
            return
        for name, arguments in found:
            if not self.is_finished:
                taken.append(ToolCallDelta(self.num_calls, arguments, self._new_id(), name))
                self.num_calls += 1

    def _speak(self, opening: str, taken: list[Part]) -> str | None:
        """Speech up to an opening mark; returns the mark, with the white space before it, once it was found."""
        before, mark, after = self._pending.partition(opening)
        certain = before if mark else before[: len(before) - overlap(before, opening)]
        # White space is held back as well: before a call it is layout and not speech.
        certain = certain.rstrip()
        taken.append(certain)
        self._pending = after if mark else before[len(certain) :]
        return before[len(certain) :] + mark if mark else None


@dataclass(frozen=True)
class Frame:
    """`opening` begins a run of calls; "" if only the beginning of the output does. `closing` ends it; "" if only the
    end of the output does. `prefix` may stand before the first call and means nothing."""

    opening: str = ""
    closing: str = ""
    prefix: str = ""


class _State(enum.Enum):
    SPEECH = enum.auto()  # a frame may open
    FRAME = enum.auto()  # between calls
    CALL = enum.auto()  # in a call's object
    PLAIN = enum.auto()  # nothing but speech from here on


class ToolCallParser(CallParser):
    """Calls that are JSON objects in a frame."""

    def __init__(self, frame: Frame, names: frozenset[str], max_calls: int | None, new_id: Callable[[], str]) -> None:
        super().__init__(names, max_calls, new_id)
        self._frame = frame
        self._state = _State.SPEECH if frame.opening else _State.FRAME
        self._framing = ""  # what stands before the current call since the frame opened, to give it back
        self._has_calls = False  # in the current frame
        self._call = CallObject()

    @property
    def is_finished(self) -> bool:
        return super().is_finished and self._state is not _State.CALL

    def step(self, taken: list[Part]) -> bool:
        if self._state is _State.FRAME:
            return self._seek_call(taken)
        if self._state is _State.CALL:
            return self._take_call(taken)
        if self._state is _State.PLAIN:
            taken.append(self._pending)
            self._pending = ""
            return False
        framing = self._speak(self._frame.opening, taken)
        if framing is None:
            return False
        self._state, self._has_calls, self._framing = _State.FRAME, False, framing
        return True

    def finish(self, taken: list[Part]) -> None:
        """A call that was given out stays as it is, anything else was speech."""
        rest = self._pending
        if self._state is _State.CALL:
            # In an answer that is calls alone, a further one that was cut off is not speech.
            is_hidden = self._call.is_given_out or (self._has_calls and not self._frame.opening)
            rest = "" if is_hidden else self._framing + self._call.raw
        elif self._state is _State.FRAME:
            rest = "" if self._has_calls else self._framing + rest
        if rest.strip() or not self.num_calls:
            taken.append(rest)

    def _seek_call(self, taken: list[Part]) -> bool:
        """In a frame: the next call, the closing mark, or something that does not belong there."""
        prefix = self._frame.prefix
        rest = self._pending.lstrip("".join(_SEPARATORS))
        if prefix and not self._has_calls:
            if rest.startswith(prefix):
                rest = rest.removeprefix(prefix).lstrip()
            elif rest and prefix.startswith(rest):
                return False
        if not rest:
            return False
        if rest[0] == "{":
            self._framing += self._pending[: len(self._pending) - len(rest)]
            self._state, self._call, self._pending = _State.CALL, CallObject(), rest
            return True
        closing = self._frame.closing
        if self._has_calls and closing:
            if rest.startswith(closing):
                self._state = _State.SPEECH if self._frame.opening else _State.PLAIN
                self._pending = rest.removeprefix(closing)
                return True
            if closing.startswith(rest):
                return False
        self._give_back("" if self._has_calls else self._framing, self._pending, taken)
        return True

    def _take_call(self, taken: list[Part]) -> bool:
        """In a call's object; True if it ended, or turned out to be no call."""
        call = self._call
        self._pending = call.take(self._pending)
        if not call.is_given_out and (begun := call.beginning()) is not None and begun[0] in self._names:
            call.is_given_out = True
            self.num_calls += 1
            taken.append(ToolCallDelta(self.num_calls - 1, begun[1], self._new_id(), begun[0]))
        if call.is_given_out and (arguments := call.new_arguments()):
            taken.append(ToolCallDelta(self.num_calls - 1, arguments))
        if call.is_given_out and call.is_complete:
            self._state, self._has_calls, self._framing = _State.FRAME, True, ""
            return True
        # Where nothing announces a call, most objects are none: those need not be held back to their end.
        is_none = call.is_complete or (not self._frame.opening and call.is_hopeless)
        if call.is_given_out or not is_none:
            return False
        self._give_back(self._framing, call.raw + self._pending, taken)
        return True

    def _give_back(self, framing: str, text: str, taken: list[Part]) -> None:
        """What was taken for a call, or for a place for one, is speech; a frame may still open behind it."""
        if not self._frame.opening:
            self._state, self._pending = _State.PLAIN, framing + text
        else:
            taken.append(framing)
            self._state, self._pending = _State.SPEECH, text
        self._framing = ""


class CallObject:
    """The JSON object of one call as it grows; `raw` is all of it so far."""

    def __init__(self) -> None:
        self.raw = ""
        self.is_complete = False
        self.is_given_out = False
        self._depth = 0
        self._is_in_string = False
        self._is_escaped = False
        self._closings: list[int] = []  # where depth 2 ended
        self._arguments_start: int | None = None
        self._num_sent = 0

    @property
    def is_hopeless(self) -> bool:
        """Whether this can no longer become a call, judged by its beginning."""
        compact = "".join(self.raw[:64].split())
        return not any(compact.startswith(one) or one.startswith(compact) for one in _BEGINNINGS)

    def take(self, text: str) -> str:
        """Take what belongs to the object, and return the rest."""
        offset = len(self.raw)
        for index, char in enumerate(text):
            if self._is_in_string:
                self._is_in_string = self._is_escaped or char != '"'
                self._is_escaped = char == "\\" and not self._is_escaped
            elif char == '"':
                self._is_in_string = True
            elif char in "{[":
                self._depth += 1
            elif char in "}]":
                self._depth -= 1
                if self._depth == 1:
                    self._closings.append(offset + index + 1)
                if self._depth == 0:
                    self.raw += text[: index + 1]
                    self.is_complete = True
                    return text[index + 1 :]
        self.raw += text
        return ""

    def beginning(self) -> tuple[str, str] | None:
        """(name, arguments), as soon as the name is known and arguments can follow as they come, which are "" then;
        or all at once when the object is complete. None if it is too early, or this is not a call."""
        head = _HEAD.match(self.raw)
        if head is not None and self.raw[head.end() : head.end() + 1] == "{":
            self._arguments_start = head.end()
            try:
                return str(json.loads(head.group(1), strict=False)), ""
            except ValueError:
                return "", ""
        return _whole(self.raw) if self.is_complete else None

    def new_arguments(self) -> str:
        """Arguments that came since the last time."""
        if self._arguments_start is None:
            return ""
        ends = (end for end in self._closings if end > self._arguments_start)
        start = self._arguments_start + self._num_sent
        new = self.raw[start : next(ends, len(self.raw))]
        self._num_sent += len(new)
        return new


def _whole(raw: str) -> tuple[str, str] | None:
    try:
        call: Any = json.loads(raw, strict=False)
    except (ValueError, RecursionError):
        return None
    if not isinstance(call, dict) or not isinstance(call.get("name"), str):
        return None
    arguments = call.get("arguments", call.get("parameters", {}))
    # Some models write the arguments as text that holds JSON.
    return call["name"], arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
