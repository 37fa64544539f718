"""The harmony format of gpt-oss: an answer in messages, each to a channel, some of them calls.

<|channel|>analysis<|message|>...<|end|><|start|>assistant<|channel|>final<|message|>...<|return|>
"""

from __future__ import annotations

import re
from collections.abc import Callable

from gateway.text.tool_parser import CallParser, Part, Thought, ToolCallDelta, overlap

CHANNEL, MESSAGE, START = "<|channel|>", "<|message|>", "<|start|>"
_ENDS = ("<|end|>", "<|call|>", "<|return|>", START, CHANNEL)
MARKS = (MESSAGE, "<|constrain|>", *_ENDS)
_RECIPIENT = re.compile(r"to=functions\.([\w.-]+)")


class HarmonyParser(CallParser):
    """Takes an answer piece by piece: analysis is thinking, calls are calls, everything else is said."""

    def __init__(self, names: frozenset[str], max_calls: int | None, new_id: Callable[[], str]) -> None:
        super().__init__(names, max_calls, new_id)
        self._header: str | None = ""  # of the message that is being announced; None in its text
        self._channel = ""
        self._name = ""  # of the function, in a call
        self._is_call = False

    @property
    def is_thinking(self) -> bool:
        return self._header is None and self._channel == "analysis"

    def step(self, taken: list[Part]) -> bool:
        if self._header is None:
            return self._take_text(taken)
        if not self._announce():
            return False
        if self._is_call:
            taken.append(ToolCallDelta(self.num_calls, "", self._new_id(), self._name))
        return True

    def finish(self, taken: list[Part]) -> None:
        if self._header is None:
            self._give_out(self._pending, taken)
        elif not (self._header + self._pending).startswith((CHANNEL, START)):
            taken.append(self._header + self._pending)

    def _announce(self) -> bool:
        """A header up to its message; True if that begins. An answer without a header is said."""
        assert self._header is not None, "in a header"
        header = self._header + self._pending
        begins = header.lstrip()
        if not any(begins.startswith(mark) or mark.startswith(begins) for mark in (CHANNEL, START)):
            self._header, self._pending, self._channel, self._is_call = None, header, "final", False
            return True
        before, mark, after = header.partition(MESSAGE)
        if not mark:
            return False
        channel = before.partition(CHANNEL)[2].split()
        self._channel = channel[0].partition("<|")[0] if channel else "final"
        recipient = _RECIPIENT.search(before)
        self._name = recipient.group(1) if recipient is not None else ""
        self._is_call = self._name in self._names
        self._header, self._pending = None, after
        return True

    def _take_text(self, taken: list[Part]) -> bool:
        """A message's text up to its end; True if that was found."""
        ends = [(self._pending.find(mark), mark) for mark in _ENDS if mark in self._pending]
        if not ends:
            num_held = max(overlap(self._pending, mark) for mark in _ENDS)
            certain = self._pending[: len(self._pending) - num_held]
            self._pending = self._pending[len(certain) :]
            self._give_out(certain, taken)
            return False
        place, mark = min(ends)
        self._give_out(self._pending[:place], taken)
        # The next message may begin with either of these.
        self._pending = self._pending[place if mark in (START, CHANNEL) else place + len(mark) :]
        self._header = ""
        if self._is_call:
            self.num_calls += 1
            self._is_call = False
        return True

    def _give_out(self, text: str, taken: list[Part]) -> None:
        if not text:
            return
        if self._is_call:
            taken.append(ToolCallDelta(self.num_calls, text))
        elif self._channel == "analysis":
            taken.append(Thought(text))
        else:
            taken.append(text)
