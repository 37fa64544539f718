"""What a reasoning model thinks before it answers, told apart from the answer while it is being written."""

from __future__ import annotations

from typing import NamedTuple

from easyspec.speculation.parameters import Thinking
from gateway.text.tool_parser import ParsedText, Thought, overlap


class Marks(NamedTuple):
    """What a family puts around its thinking, and before every answer."""

    opening: str
    closing: str
    answer: str = ""


# A template that writes or looks for the closing mark is of that family.
_FAMILIES = (
    Marks("<think>", "</think>"),
    Marks("[THINK]", "[/THINK]"),
    Marks("<seed:think>", "</seed:think>"),
    Marks("<|START_THINKING|>", "<|END_THINKING|>"),
    Marks("\u25c1think\u25b7", "\u25c1/think\u25b7"),
)
# Of gpt-oss: an answer has a channel of its own, thinking or not.
HARMONY = Marks("<|channel|>analysis<|message|>", "<|end|><|start|>assistant", "<|channel|>final<|message|>")


def marks_in(chat_template: str) -> Marks | None:
    """The marks around thinking that a chat template knows; None if it knows none."""
    if "<|channel|>" in chat_template:
        return HARMONY
    return next((marks for marks in _FAMILIES if marks.closing in chat_template), None)


def thinking_after(prompt: str, begun_answer: str, marks: Marks | None) -> Thinking | None:
    """What may come before the answer to a rendered prompt; None if there is no thinking, or it is over. `begun_answer`
    is a last turn that the model goes on with, "" if it begins a new one."""
    if marks is None:
        return None
    opening, closing, answer = marks
    end = prompt.rstrip()
    if begun_answer:
        is_open = begun_answer.rfind(opening) > begun_answer.rfind(closing)
        return Thinking(opening, closing, True, answer) if is_open else None
    if end.endswith(answer or closing):
        return None
    return Thinking(opening, closing, end.endswith(opening), answer)


class ReasoningSplitter:
    """Takes an answer piece by piece. Marks, and white space beside them, belong to neither side."""

    def __init__(self, thinking: Thinking) -> None:
        self._thinking = thinking
        self._pending = ""
        self._has_spoken = False  # on the present side
        self._has_begun = thinking.is_open  # or is past the place where thinking could
        self._awaits_answer = bool(thinking.answer)
        self.is_thinking = thinking.is_open

    def push(self, text: str) -> ParsedText:
        self._pending += text
        reasoning = ""
        if not self._has_begun and not self._begin():
            return ParsedText()
        if self.is_thinking:
            reasoning, is_over = self._think()
            if not is_over:
                return ParsedText((Thought(reasoning),))
        return ParsedText((Thought(reasoning), self._say()))

    def flush(self) -> ParsedText:
        """The rest, when nothing more comes: thinking that was cut off stays thinking."""
        rest, self._pending = self._pending, ""
        if self.is_thinking:
            return ParsedText((Thought(rest.rstrip()),))
        is_cut_mark = self._awaits_answer and any(mark.startswith(rest.lstrip()) for mark in self._first_marks)
        return ParsedText(("" if is_cut_mark else rest,))

    @property
    def _first_marks(self) -> tuple[str, ...]:
        return tuple(mark for mark in (self._thinking.opening, self._thinking.answer) if mark)

    def _begin(self) -> bool:
        """Whether it is clear how the answer begins."""
        opening = self._thinking.opening
        start = self._pending.lstrip()
        if any(_may_become(start, mark) for mark in self._first_marks):
            return False
        self._has_begun = True
        if start.startswith(opening):
            self.is_thinking = True
            self._pending = start.removeprefix(opening)
        elif not start.startswith(self._thinking.answer or opening):
            self._has_spoken = True  # an answer without thinking keeps its white space
            self._awaits_answer = False
        return True

    def _think(self) -> tuple[str, bool]:
        """Thoughts that are certain, and whether there will be no more of them."""
        if not self._has_spoken:
            self._pending = self._pending.lstrip()
        before, closing, after = self._pending.partition(self._thinking.closing)
        if closing:
            self.is_thinking, self._has_spoken, self._pending = False, False, after
            return before.rstrip(), True
        # White space may be what stands before the closing mark.
        certain = before[: len(before) - overlap(before, self._thinking.closing)].rstrip()
        self._pending = before[len(certain) :]
        self._has_spoken = self._has_spoken or bool(certain)
        return certain, False

    def _say(self) -> str:
        answer = self._thinking.answer
        if self._awaits_answer:
            start = self._pending.lstrip()
            if _may_become(start, answer):
                return ""
            self._awaits_answer = False
            self._pending = start.removeprefix(answer)
        text, self._pending = self._pending, ""
        if not self._has_spoken:
            text = text.lstrip()
            self._has_spoken = bool(text)
        return text


def _may_become(start: str, mark: str) -> bool:
    """Whether a text is the beginning of a mark and not yet all of it."""
    return len(start) < len(mark) and mark.startswith(start)
