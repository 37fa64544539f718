"""What a request asks for: plain data, validated where it enters."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field

from easyspec.errors import InvalidRequestError

MAX_SEED = 2**64 - 1
MAX_GRAMMAR_BYTES = 64 * 1024
MAX_TOP_LOGPROBS = 20
MAX_MARK_CHARS = 64
# Rounds that a verifier goes on with unasked behind a tree.
MAX_PLAIN_ROUNDS = 64


class GrammarKind(enum.Enum):
    """How a grammar is written; the values are the wire's field names."""

    JSON_SCHEMA = "json_schema"
    REGEX = "regex"
    LARK = "lark"


@dataclass(frozen=True)
class Thinking:
    """What may stand before an answer: free text between two marks. `is_open`: the prompt has begun it already, and it
    must come to its end. `answer` is a mark that begins every answer, "" if there is none."""

    opening: str
    closing: str
    is_open: bool
    answer: str = ""

    def check(self) -> None:
        """Raise InvalidRequestError for the first mark that is too short or too long."""
        for name, mark, least in (
            ("opening", self.opening, 1),
            ("closing", self.closing, 1),
            ("answer", self.answer, 0),
        ):
            if not least <= len(mark) <= MAX_MARK_CHARS:
                field_name = f"sampling.grammar.thinking.{name}"
                raise InvalidRequestError(field_name, mark, f"{least} to {MAX_MARK_CHARS} characters")


@dataclass(frozen=True)
class Grammar:
    """A language that the whole output belongs to, but for the `thinking` before it; `types.proto` states each kind."""

    kind: GrammarKind
    text: str
    thinking: Thinking | None = None


@dataclass(frozen=True)
class SamplingParameters:
    """How the next token is chosen from the base model's logits; `types.proto` states every range."""

    seed: int
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    grammar: Grammar | None = None

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0.0

    @property
    def has_penalties(self) -> bool:
        """True if the choice depends on which tokens came before."""
        return (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (1.0, 0.0, 0.0)

    def check(self, vocab_size: int) -> None:
        """Raise InvalidRequestError for the first value out of range, NaN and infinity included."""
        _check_range("sampling.seed", self.seed, 0, MAX_SEED)
        _check_range("sampling.temperature", self.temperature, 0.0, 100.0)
        if self.top_k is not None and self.top_k < 1:
            raise InvalidRequestError("sampling.top_k", self.top_k, "at least 1, or unset for all")
        if not 0.0 < self.top_p <= 1.0:
            raise InvalidRequestError("sampling.top_p", self.top_p, "above 0, up to 1")
        _check_range("sampling.min_p", self.min_p, 0.0, 1.0)
        if not (0.0 < self.repetition_penalty <= 100.0):
            raise InvalidRequestError("sampling.repetition_penalty", self.repetition_penalty, "above 0, up to 100")
        _check_range("sampling.presence_penalty", self.presence_penalty, -2.0, 2.0)
        _check_range("sampling.frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        if self.grammar is not None and not 1 <= len(self.grammar.text.encode()) <= MAX_GRAMMAR_BYTES:
            num_bytes = len(self.grammar.text.encode())
            name = f"sampling.grammar.{self.grammar.kind.value}"
            raise InvalidRequestError(name, f"{num_bytes} bytes", f"1 to {MAX_GRAMMAR_BYTES} bytes")
        if self.grammar is not None and self.grammar.thinking is not None:
            self.grammar.thinking.check()
        for token_id, bias in self.logit_bias.items():
            _check_range("sampling.logit_bias token id", token_id, 0, vocab_size - 1)
            _check_range(f"sampling.logit_bias[{token_id}]", bias, -100.0, 100.0)


def _check_range(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:  # nor is NaN
        raise InvalidRequestError(name, value, f"{low} to {high}")


@dataclass(frozen=True)
class StopConditions:
    """When decoding ends; a stop token beats `max_tokens`. None: whatever fits the context. No stop token and no
    end-of-sequence token is chosen before `min_tokens`, unless a grammar leaves nothing else."""

    max_tokens: int | None = None
    stop_token_ids: frozenset[int] = frozenset()
    ignore_eos: bool = False
    min_tokens: int = 0

    def check(self, vocab_size: int) -> None:
        """Raise InvalidRequestError for the first value out of range."""
        if self.max_tokens is not None and self.max_tokens < 1:
            raise InvalidRequestError("stop.max_tokens", self.max_tokens, "at least 1, or unset")
        if self.min_tokens < 0 or (self.max_tokens is not None and self.min_tokens > self.max_tokens):
            raise InvalidRequestError("stop.min_tokens", self.min_tokens, "0 to max_tokens")
        for token_id in sorted(self.stop_token_ids):
            _check_range("stop.stop_token_ids", token_id, 0, vocab_size - 1)


class FinishReason(enum.Enum):
    """Why the output ended."""

    STOP = "stop"
    LENGTH = "length"
    TOOL_CALLS = "tool_calls"  # the gateway's: a stop, after at least one call


@dataclass(frozen=True)
class TreeBudget:
    """How large a draft tree may be: levels, nodes expanded per level, nodes in all (root excluded)."""

    num_levels: int
    width: int
    num_nodes: int

    def check(self, max_nodes: int) -> None:
        """Raise InvalidRequestError for the first value out of range."""
        _check_range("budget.num_levels", self.num_levels, 1, 64)
        _check_range("budget.width", self.width, 1, 64)
        _check_range("budget.num_nodes", self.num_nodes, 1, max_nodes)


class MlpPlacement(enum.Enum):
    """Where the MLPs of a layer group run (DESIGN: EasySpec drafting)."""

    SEQUENTIAL = "sequential"
    STAGED = "staged"


@dataclass(frozen=True)
class LayerPlanRequest:
    """A request's wish for the drafter's layer plan; None takes the service's default."""

    layer_parallel_size: int | None = None
    mlp: MlpPlacement | None = None
    calibration: bool = True
