"""One choice's output, from tokens to what is thought, said and called."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

from easyspec.speculation.parameters import Thinking
from gateway.conversation import Tools
from gateway.detokenizer import Detokenizer
from gateway.harmony import MARKS as HARMONY_MARKS
from gateway.harmony import HarmonyParser
from gateway.reasoning import ReasoningSplitter
from gateway.tokenizer import Tokenizer
from gateway.tool_parser import ParsedText, Part, Thought, ToolCallDelta
from gateway.tools import ToolDialect, marks_of, parser_for


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
        matched_stop = detokenized.matched_stop
        is_last = is_last or matched_stop is not None
        if isinstance(self._parser, HarmonyParser):
            parts, said, num_reasoning_tokens = self._harmony(self._parser, detokenized.pieces, is_last)
            is_over = self._parser.is_finished
        else:
            thought, said, num_reasoning_tokens = self._split(detokenized.pieces, is_last, detokenized.num_tokens)
            parts, is_over = self._parsed(said, is_last)
            parts = [Thought(thought), *parts]
        return AnswerRound(
            ParsedText(tuple(_in_runs(parts))),
            detokenized.num_tokens,
            matched_stop,
            is_over,
            num_reasoning_tokens,
            len(detokenized.text),
            said,
        )

    def _split(self, pieces: Sequence[str], is_last: bool, num_tokens: int) -> tuple[str, str, int]:
        """(thought, said, tokens of thinking) in a round; a piece is a token's, the last may be none's."""
        splitter = self._splitter
        if splitter is None:
            return "", "".join(pieces), 0
        thought, said, num_thinking = "", "", 0
        for index, piece in enumerate(pieces):
            was_thinking = splitter.is_thinking
            split = splitter.push(piece)
            thought, said = thought + split.reasoning, said + split.text
            is_thinking = was_thinking or splitter.is_thinking
            num_thinking += is_thinking and index < num_tokens
        if is_last:
            rest = splitter.flush()
            thought, said = thought + rest.reasoning, said + rest.text
        return thought, said, num_thinking

    def _harmony(self, parser: HarmonyParser, pieces: Sequence[str], is_last: bool) -> tuple[list[Part], str, int]:
        """(what is thought, said and called, what is said alone, tokens of thinking) in a round."""
        parts: list[Part] = []
        num_thinking = 0
        for piece in pieces:
            was_thinking = parser.is_thinking
            parts += parser.push(piece).parts
            num_thinking += bool(piece) and (was_thinking or parser.is_thinking)
        if is_last:
            parts += parser.flush().parts
        return parts, ParsedText(tuple(parts)).text, num_thinking

    def _parsed(self, said: str, is_last: bool) -> tuple[list[Part], bool]:
        """What is said and called in a round's text, and whether no further call is wanted."""
        parser = self._parser
        if parser is None:
            return [said], False
        parts = list(parser.push(said).parts)
        is_over = parser.is_finished
        if is_last and not is_over:
            parts += parser.flush().parts
        return parts, is_over


def _in_runs(parts: Iterable[Part]) -> Iterator[Part]:
    """The same without what is empty, speech and thoughts that follow each other as one."""
    for kind, run in groupby(parts, type):
        if kind is ToolCallDelta:
            yield from run
            continue
        texts = ParsedText(tuple(run))
        if text := texts.text + texts.reasoning:
            yield text if kind is str else Thought(text)
