"""A completion and how long its client waited for it, of any server."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

PLAIN = "plain"


@dataclass(frozen=True)
class Maker:
    program: str
    way: str = PLAIN

    @property
    def plain(self) -> Maker:
        return Maker(self.program)

    def __str__(self) -> str:
        return f"{self.program}, {self.way}"


@dataclass(frozen=True)
class DecodePhase:
    """What came behind the first message of a stream: how many tokens, and how long after it the last one."""

    num_tokens: int
    elapsed_s: float

    @classmethod
    def of_arrivals(cls, arrivals: Sequence[tuple[float, int]]) -> DecodePhase | None:
        """Of each message's time and number of tokens; None if all came at once."""
        if len(arrivals) < 2:
            return None
        return cls(sum(num_tokens for _, num_tokens in arrivals[1:]), arrivals[-1][0] - arrivals[0][0])


@dataclass(frozen=True)
class Answer:
    """What was said, as token ids or, where a server tells none, as text; `decode` is None if it was not streamed."""

    content: tuple[int, ...] | str
    num_tokens: int
    decode: DecodePhase | None = None


@dataclass(frozen=True)
class TimedCompletion:
    """`maker` made it, `elapsed_s` is the time from asking to the last token, reading the prompt included."""

    maker: Maker
    task_name: str
    temperature: float
    prompt_index: int
    answer: Answer
    elapsed_s: float

    @property
    def tokens_per_s(self) -> float:
        return self.answer.num_tokens / self.elapsed_s

    @property
    def decode_tokens_per_s(self) -> float | None:
        decode = self.answer.decode
        return None if decode is None else decode.num_tokens / decode.elapsed_s
