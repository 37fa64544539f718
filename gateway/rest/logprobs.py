"""Log-probabilities in the two shapes that OpenAI has for them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from easyspec.speculation.messages import TokenLogprobs
from gateway.messages.chunk import GenerationChunk
from gateway.text.detokenizer import TokenTextStream
from gateway.text.tokenizer import Tokenizer

# JSON knows no infinity; this is what OpenAI's API says for "practically impossible".
_LEAST_LOGPROB = -9999.0


@dataclass(frozen=True)
class TokenEntry:
    """One token of an output: where its text begins, and how likely it was (None if nothing precedes it)."""

    token_id: int
    text_offset: int
    logprobs: TokenLogprobs | None


class LogprobTrack:
    """The entries of one choice, in step with its text: none is given out whose text is held back or cut off. Tokens
    that lie in a matched stop string, and the token that ends the output, are not part of the text and have no entry.
    `includes_stop` says that they are part of it. After an echoed prompt the last token has an entry in any case:
    evaluation harnesses ask for one token and count on it."""

    def __init__(self, tokenizer: Tokenizer, has_stop_strings: bool, includes_stop: bool = False) -> None:
        self._tokenizer = tokenizer
        self._stream = TokenTextStream(tokenizer)
        self._is_holding = has_stop_strings
        self._includes_stop = includes_stop
        self._is_echoing = False
        self._num_chars = 0  # of the text given out
        self._offset = 0  # where the next token's text begins
        self._held: list[TokenEntry] = []

    def push_prompt(self, chunk: GenerationChunk) -> list[TokenEntry]:
        self._is_echoing = True
        entries = self._entries(chunk)
        self._stream = TokenTextStream(self._tokenizer)
        self._offset = self._num_chars = len(chunk.text)
        return entries

    def push(self, chunk: GenerationChunk) -> list[TokenEntry]:
        """Entries that became final with a chunk of output."""
        self._held += self._entries(chunk)
        self._num_chars += chunk.num_chars
        completion = chunk.completion
        if completion is not None and (end := completion.matched_token_id) is not None and not self._is_echoing:
            has_text = self._includes_stop and end not in self._tokenizer.special_token_ids
            self._held = self._held if has_text else self._held[:-1]
        is_cut = completion is not None and completion.matched_stop_string is not None
        is_all_due = completion is not None or not self._is_holding
        due = [entry for entry in self._held if entry.text_offset < self._num_chars or (is_all_due and not is_cut)]
        self._held = self._held[len(due) :]
        return due

    def _entries(self, chunk: GenerationChunk) -> list[TokenEntry]:
        entries = []
        for token_id, logprobs in zip(chunk.token_ids, chunk.logprobs, strict=False):
            entries.append(TokenEntry(token_id, self._offset, logprobs))
            self._offset += len(self._stream.push(token_id))
        return entries


class LogprobFormat:
    """Renders entries with `num_top` of the likeliest tokens each; `tokenizer` tells the bytes of a token."""

    def __init__(self, tokenizer: Tokenizer, num_top: int | None) -> None:
        self._tokenizer = tokenizer
        self._num_top = num_top or 0

    def chat(self, entries: Sequence[TokenEntry]) -> dict[str, Any]:
        """As in chat completions: one object a token, with its bytes."""
        content = []
        for entry in entries:
            logprobs = entry.logprobs or TokenLogprobs(0.0)
            top = [self._chat_token(token_id, logprob) for token_id, logprob in logprobs.top[: self._num_top]]
            content.append({**self._chat_token(entry.token_id, logprobs.logprob), "top_logprobs": top})
        return {"content": content, "refusal": None}

    def completion(self, entries: Sequence[TokenEntry]) -> dict[str, Any]:
        """As in completions: parallel lists. The token itself is among the likeliest, as OpenAI has it."""
        tops: list[dict[str, float] | None] = []
        for entry in entries:
            if entry.logprobs is None:
                tops.append(None)
                continue
            top: dict[str, float] = {}
            for token_id, logprob in (*entry.logprobs.top[: self._num_top], (entry.token_id, entry.logprobs.logprob)):
                top.setdefault(self._text(token_id), _finite(logprob))
            tops.append(top)
        return {
            "tokens": [self._text(entry.token_id) for entry in entries],
            "token_logprobs": [_finite(entry.logprobs.logprob) if entry.logprobs else None for entry in entries],
            "top_logprobs": tops,
            "text_offset": [entry.text_offset for entry in entries],
        }

    def prompt(self, chunk: GenerationChunk) -> list[dict[str, Any] | None]:
        """As vLLM tells them of a prompt: by token id, the token itself among the likeliest. None for the first one,
        which nothing precedes; no rank for a token that is not among the likeliest."""
        told: list[dict[str, Any] | None] = []
        for token_id, logprobs in zip(chunk.token_ids, chunk.logprobs, strict=True):
            if logprobs is None:
                told.append(None)
                continue
            ranked = {one: (logprob, rank) for rank, (one, logprob) in enumerate(logprobs.top[: self._num_top], 1)}
            told.append(
                {
                    str(one): {"logprob": _finite(logprob), "rank": rank, "decoded_token": self._text(one)}
                    for one, (logprob, rank) in ({token_id: (logprobs.logprob, None)} | ranked).items()
                }
            )
        return told

    def _chat_token(self, token_id: int, logprob: float) -> dict[str, Any]:
        return {
            "token": self._text(token_id),
            "logprob": _finite(logprob),
            "bytes": list(self._tokenizer.token_bytes(token_id)),
        }

    def _text(self, token_id: int) -> str:
        raw = self._tokenizer.token_bytes(token_id)
        try:
            return raw.decode()
        except UnicodeDecodeError:  # part of a character
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def _finite(logprob: float) -> float:
    return max(logprob, _LEAST_LOGPROB)
