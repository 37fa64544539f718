"""Token ids to text, as they come: never half a character, never text past a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from gateway.text.tokenizer import Tokenizer
from gateway.text.tool_parser import overlap

REPLACEMENT = "\ufffd"
# A character takes at most four bytes, so at most three replacement characters at the end may still become one.
_MAX_UNDECIDED = 3
# Tokens that are decoded again with each one that comes, where no character ends: bytes that are not text at all.
_MAX_WINDOW = 256
_CUT_TOKENS = range(2 * _MAX_UNDECIDED + 2, 4 * _MAX_UNDECIDED + 4)


class TokenTextStream:
    """Turns tokens into text one by one; all texts joined are the decode of all tokens, special tokens left out but for
    those in `visible_token_ids`. Decoding a token alone is not enough: a character may span tokens, and some tokenizers
    drop the blank of a first word. So a window is decoded that begins with the tokens already finished (prefix offset
    technique)."""

    def __init__(self, tokenizer: Tokenizer, visible_token_ids: frozenset[int] = frozenset()) -> None:
        self._tokenizer = tokenizer
        self._special_token_ids = tokenizer.special_token_ids - visible_token_ids
        self._window: list[int] = []
        self._num_finished_tokens = 0  # of the window; their text ends on a character boundary
        self._num_emitted_chars = 0  # of the window's text

    def push(self, token_id: int) -> str:
        """Text that became final with this token."""
        if token_id in self._special_token_ids:
            return ""
        self._window.append(token_id)
        text = self._tokenizer.decode(self._window)
        num_undecided = min(_MAX_UNDECIDED, len(text) - len(text.rstrip(REPLACEMENT)))
        num_final_chars = len(text) - num_undecided
        final_text = text[self._num_emitted_chars : num_final_chars]
        self._num_emitted_chars = max(self._num_emitted_chars, num_final_chars)
        if num_final_chars == len(text) and final_text:
            self._window = self._window[self._num_finished_tokens :]
            self._num_finished_tokens = len(self._window)
            self._num_emitted_chars = len(self._tokenizer.decode(self._window))
        elif len(self._window) >= _MAX_WINDOW:
            self._cut(text)
        return final_text

    def flush(self) -> str:
        """What was held back; an incomplete character is U+FFFD, as in a decode of everything."""
        text = self._tokenizer.decode(self._window)[self._num_emitted_chars :]
        self._num_emitted_chars += len(text)
        return text

    def _cut(self, text: str) -> None:
        """Forget the beginning of a window, where the rest has the same text without it."""
        for num_kept in _CUT_TOKENS:
            head, tail = self._window[:-num_kept], self._window[-num_kept:]
            head_text = self._tokenizer.decode(head)
            if len(head_text) <= self._num_emitted_chars and head_text + self._tokenizer.decode(tail) == text:
                self._window, self._num_finished_tokens = tail, 0
                self._num_emitted_chars -= len(head_text)
                return


class StopMatcher:
    """Finds the stop string that is complete first; holds back text that may be the beginning of one, unless the stop
    string is itself wanted (`includes_stop`)."""

    def __init__(self, stop_strings: Sequence[str], includes_stop: bool = False) -> None:
        self._stop_strings = tuple(stop_strings)
        self._includes_stop = includes_stop
        self._held = ""
        self.matched: str | None = None

    def push(self, text: str) -> str:
        """Text that can no longer belong to a stop string; with `matched` set, all that came before its end or, unless
        it is wanted, its beginning."""
        text = self._held + text
        # Of several matches the one that ends first counts, and of those the longest: what one would find
        # reading character by character, however the text was cut into pieces.
        matches = [(start + len(stop), start, stop) for stop in self._stop_strings if (start := text.find(stop)) >= 0]
        if matches:
            end, start, self.matched = min(matches)
            self._held = ""
            return text[: end if self._includes_stop else start]
        num_held = max((overlap(text, stop) for stop in self._stop_strings), default=0)
        self._held = text[len(text) - num_held :]
        return text[: len(text) - num_held]

    def flush(self) -> str:
        """What was held back and turned out to be no stop string."""
        text, self._held = self._held, ""
        return text


@dataclass(frozen=True)
class DetokenizedRound:
    """Final text of a round by token, with one piece more at the end of the output; how many of its tokens stand, and
    the stop string that cut the rest."""

    pieces: tuple[str, ...]
    num_tokens: int
    matched_stop: str | None

    @property
    def text(self) -> str:
        return "".join(self.pieces)


class Detokenizer:
    """One request's output, from tokens to text. Takes several tokens per round and treats them one by one, so the
    text does not depend on how the tokens were cut into rounds. No stop string is looked for in the first `min_tokens`
    tokens."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        stop_strings: Sequence[str],
        visible_token_ids: frozenset[int] = frozenset(),
        includes_stop: bool = False,
        min_tokens: int = 0,
    ) -> None:
        self._num_unending = min_tokens
        self._stream = TokenTextStream(tokenizer, visible_token_ids)
        self._matcher = StopMatcher(stop_strings, includes_stop)
        self._includes_stop = includes_stop

    def push(self, token_ids: Sequence[int], is_last: bool, has_stop_token: bool = False) -> DetokenizedRound:
        """Take a round's tokens; `is_last` flushes what was held back, `has_stop_token` says that the last one is a
        stop token. The token that completes a stop string is the last one that counts. Neither a stop string nor a stop
        token is part of the text, unless stops are included."""
        pieces = []
        num_hidden = 1 if has_stop_token and not self._includes_stop else 0
        for index, token_id in enumerate(token_ids[: len(token_ids) - num_hidden]):
            text = self._stream.push(token_id)
            if self._num_unending:
                self._num_unending -= 1
                pieces.append(text)
                continue
            pieces.append(self._matcher.push(text))
            if self._matcher.matched is not None:
                return DetokenizedRound(tuple(pieces), index + 1, self._matcher.matched)
        if is_last:
            pieces.append(self._matcher.push(self._stream.flush()) + self._matcher.flush())
        return DetokenizedRound(tuple(pieces), len(token_ids), self._matcher.matched)
