"""One choice's output, from tokens to what is thought, said and called."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby

from easyspec.speculation.parameters import Thinking
from gateway.text.conversation import Tools
from gateway.text.detokenizer import Detokenizer
from gateway.text.harmony import MARKS as HARMONY_MARKS
from gateway.text.harmony import HarmonyParser
from gateway.text.reasoning import ReasoningSplitter
from gateway.text.tokenizer import Tokenizer
from gateway.text.tool_parser import ParsedText, Part, Thought, ToolCallDelta
from gateway.text.tools import ToolDialect, marks_of, parser_for


@dataclass(frozen=True)
class AnswerForm:
    """How an answer is read: where it stops, whether stops are part of it, what may be called in it, and thought before
    it."""

    stop_strings: Sequence[str] = ()
    includes_stop: bool = False
    min_tokens: int = 0
    tools: Tools | None = None
    dialect: ToolDialect = ToolDialect.NONE
    thinking: Thinking | None = None


@dataclass(frozen=True)
class AnswerRound:
    """What became final in a round, in its order; how many of its tokens stand, and the stop string that cut the rest.

    `num_chars` became final of the output, `written` is what of it comes after any thinking. `num_reasoning_tokens` of
    the tokens belong to thinking. `is_over` means that no further call is wanted and the answer ends here.
    """

    parsed: ParsedText
    num_tokens: int
    matched_stop: str | None
    is_over: bool
    num_reasoning_tokens: int = 0
    num_chars: int = 0
    written: str = ""


class AnswerText:
    """Takes tokens round by round; the result does not depend on how they were cut into rounds."""

    def __init__(self, tokenizer: Tokenizer, form: AnswerForm) -> None:
        self._parser = parser_for(form.tools, form.dialect)
        self._splitter = ReasoningSplitter(form.thinking) if form.thinking is not None else None
        marks = marks_of(form.dialect) if self._parser is not None else ()
        if form.thinking is not None:
            marks = (*marks, form.thinking.opening, form.thinking.closing)
            marks += HARMONY_MARKS if form.thinking.answer else ()
        visible = tokenizer.special_ids_of(marks)
        self._detokenizer = Detokenizer(tokenizer, form.stop_strings, visible, form.includes_stop, form.min_tokens)

    @property
    def has_calls(self) -> bool:
        return self._parser is not None and self._parser.num_calls > 0

    def push(self, token_ids: Sequence[int], is_last: bool, has_stop_token: bool = False) -> AnswerRound:
        """Take a round's tokens; `is_last` gives out what was held back, `has_stop_token` says that the last one is a
        stop token."""
        detokenized = self._detokenizer.push(token_ids, is_last, has_stop_token)
        taken = _Taken()
        for piece in detokenized.pieces:
            self._take(piece, taken, is_tokens=taken.num_pieces < detokenized.num_tokens)
            if self._is_finished:  # later tokens of the block are not part of the answer
                break
        if (is_last or detokenized.matched_stop is not None) and not self._is_finished:
            if self._splitter is not None and not isinstance(self._parser, HarmonyParser):
                rest = self._splitter.flush()
                taken.parts.append(Thought(rest.reasoning))
                self._read(rest.text, taken)
            if self._parser is not None and not self._parser.is_finished:
                parts = self._parser.flush().parts
                taken.add(parts, ParsedText(parts).text if isinstance(self._parser, HarmonyParser) else "")
        is_over = self._is_finished
        return AnswerRound(
            ParsedText(tuple(_in_runs(taken.parts))),
            min(detokenized.num_tokens, taken.num_pieces) if is_over else detokenized.num_tokens,
            None if is_over else detokenized.matched_stop,
            is_over,
            taken.num_reasoning_tokens,
            sum(map(len, detokenized.pieces[: taken.num_pieces])),
            "".join(taken.written),
        )

    @property
    def _is_finished(self) -> bool:
        """Whether no further call is wanted."""
        return self._parser is not None and self._parser.is_finished

    @property
    def _is_thinking(self) -> bool:
        if isinstance(self._parser, HarmonyParser):
            return self._parser.is_thinking
        return self._splitter is not None and self._splitter.is_thinking

    def _take(self, piece: str, taken: _Taken, *, is_tokens: bool) -> None:
        """Take a piece of text; `is_tokens` says that it is a token's, as all are but for what was held back."""
        was_thinking = self._is_thinking
        if isinstance(self._parser, HarmonyParser):
            parts = self._parser.push(piece).parts
            is_tokens = bool(piece)
            taken.add(parts, ParsedText(parts).text)
        elif self._splitter is None:
            self._read(piece, taken)
        else:
            split = self._splitter.push(piece)
            taken.parts.append(Thought(split.reasoning))
            self._read(split.text, taken)
        taken.num_pieces += 1
        taken.num_reasoning_tokens += is_tokens and (was_thinking or self._is_thinking)

    def _read(self, said: str, taken: _Taken) -> None:
        """Take what is written after any thinking."""
        taken.add(self._parser.push(said).parts if self._parser is not None else (said,), said)


@dataclass
class _Taken:
    """What was read in a round: its parts, the text of it that comes after thinking, how many pieces it was."""

    parts: list[Part] = field(default_factory=list)
    written: list[str] = field(default_factory=list)
    num_pieces: int = 0
    num_reasoning_tokens: int = 0

    def add(self, parts: Sequence[Part], written: str) -> None:
        self.parts += parts
        self.written.append(written)


def _in_runs(parts: Iterable[Part]) -> Iterator[Part]:
    """The same without what is empty, speech and thoughts that follow each other as one."""
    for kind, run in groupby(parts, type):
        if kind is ToolCallDelta:
            yield from run
            continue
        texts = ParsedText(tuple(run))
        if text := texts.text + texts.reasoning:
            yield text if kind is str else Thought(text)
