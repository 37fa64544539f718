"""Grammars as a session walks them: which tokens may come next.

A grammar constrains the whole output, and its state is a function of the output's tokens alone: plain decoding and
speculation meet the same masks, and a session that is opened again replays it.

* Allowed are the tokens with which the output can still be completed; where only one text can follow, the tokens that
  the tokenizer would cut it into. An end-of-sequence token is allowed where the output is complete.
* Where nothing else may follow, end-of-sequence is the only choice: it ends the output with STOP, whatever
  `ignore_eos` says. With `ignore_eos` it is allowed there only, so the output goes on as long as the grammar lets it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import llguidance
import numpy as np
from numpy.typing import NDArray

from easyspec.errors import InvalidRequestError
from easyspec.speculation.parameters import Grammar

MAX_REASON_CHARS = 160


def grammar_error(grammar: Grammar, reason: str) -> InvalidRequestError:
    """The error that names a grammar and what is wrong with it, as the library puts it."""
    # What follows the first empty line or "<state>" is a dump of the parser.
    message = " ".join(reason.split("<state>")[0].split())
    message = message if len(message) <= MAX_REASON_CHARS else f"{message[:MAX_REASON_CHARS]}..."
    return InvalidRequestError(
        f"sampling.grammar.{grammar.kind.value}", grammar.text, f"what can be compiled and followed, but: {message}"
    )


@dataclass(eq=False)
class CompiledGrammar:
    """A grammar ready to be walked by any number of sessions; `start` is never advanced itself.

    `vocab_size` is the base model's. `is_spent` says that a walk ran into a limit of the library: what sessions of
    one grammar learn about it is shared, so the next one had better compile it anew.
    """

    grammar: Grammar
    start: llguidance.LLMatcher
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    is_spent: bool = field(default=False)


class GrammarState:
    """One output's place in a grammar. Not thread-safe, but states of one grammar may live on different threads."""

    def __init__(self, compiled: CompiledGrammar, *, ignore_eos: bool) -> None:
        self._compiled = compiled
        self._matcher = compiled.start.deep_copy()
        self._ignore_eos = ignore_eos

    def advance(self, token_id: int) -> bool:
        """Append a token of the output; False, and no step made, if it is not allowed here."""
        if self._matcher.try_consume_tokens([token_id]) == 1:
            return True
        self._check()
        return False

    def rollback(self, num_tokens: int) -> None:
        """Take the last tokens back; takes no longer in a long output, which copying the state would."""
        if num_tokens:
            self._matcher.rollback(num_tokens)

    @property
    def has_ended(self) -> bool:
        return bool(self._matcher.stop_reason() == "EndOfSentence")

    def allowed_bits(self) -> NDArray[np.uint8]:
        """The tokens that may come next, at least one: bit `i % 8` of byte `i // 8` is token i; [ceil(V / 8)].

        Raises InvalidRequestError if the grammar became too complex to follow, or no token fits.
        """
        num_bytes = (self._compiled.vocab_size + 7) // 8
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)[:num_bytes].copy()
        self._check()
        if self._compiled.vocab_size % 8:
            bits[-1] &= (1 << self._compiled.vocab_size % 8) - 1
        others = bits.copy()
        for token_id in self._compiled.eos_token_ids:
            others[token_id // 8] &= ~(1 << token_id % 8) & 0xFF
        # A grammar may name an end of sequence like any token, which the library does not take where more must follow.
        is_no_end = not np.array_equal(bits, others) and not self._matcher.is_accepting()
        if is_no_end or (self._ignore_eos and others.any()):
            bits = others
        if not bits.any():
            raise grammar_error(self._compiled.grammar, "no token of the model fits what must come next")
        return bits

    def _check(self) -> None:
        """Raise if the walk is at a dead end: complex beyond the limits, or stopped in mid-sentence."""
        if self._matcher.is_error() or (self._matcher.is_stopped() and not self._matcher.is_accepting()):
            self._compiled.is_spent = True
            reason = self._matcher.get_error() or f"no token fits ({self._matcher.stop_reason()})"
            raise grammar_error(self._compiled.grammar, reason)
