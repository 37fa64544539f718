"""One choice's output, from tokens to what is said and what is called."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from gateway.conversation import Tools
from gateway.detokenizer import Detokenizer
from gateway.tokenizer import Tokenizer
from gateway.tool_parser import ToolCallDelta
from gateway.tools import ToolDialect, marks_of, parser_for


@dataclass(frozen=True)
class AnswerRound:
    """What became final in a round; how many of its tokens stand, and the stop string that cut the rest.

    `is_over` means that no further call is wanted and the answer ends here.
    """

    text: str
    tool_calls: tuple[ToolCallDelta, ...]
    num_tokens: int
    matched_stop: str | None
    is_over: bool


class AnswerText:
    """Takes tokens round by round; the result does not depend on how they were cut into rounds."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        stop_strings: Sequence[str],
        tools: Tools | None,
        dialect: ToolDialect,
        includes_stop: bool = False,
    ) -> None:
        self._parser = parser_for(tools, dialect) if tools is not None else None
        visible = tokenizer.special_ids_of(marks_of(dialect)) if self._parser is not None else frozenset()
        self._detokenizer = Detokenizer(tokenizer, stop_strings, visible, includes_stop)

    @property
    def has_calls(self) -> bool:
        return self._parser is not None and self._parser.num_calls > 0

    def push(self, token_ids: Sequence[int], is_last: bool, has_stop_token: bool = False) -> AnswerRound:
        """Take a round's tokens; `is_last` gives out what was held back, `has_stop_token` says that the last one is a
        stop token."""
        detokenized = self._detokenizer.push(token_ids, is_last, has_stop_token)
        num_tokens, matched_stop = detokenized.num_tokens, detokenized.matched_stop
        if self._parser is None:
            return AnswerRound(detokenized.text, (), num_tokens, matched_stop, is_over=False)
        parsed = self._parser.push(detokenized.text)
        is_over = self._parser.is_finished
        rest = self._parser.flush().text if (is_last or matched_stop is not None) and not is_over else ""
        return AnswerRound(parsed.text + rest, parsed.calls, num_tokens, matched_stop, is_over)
