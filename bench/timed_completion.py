"""A completion and how long its client waited for it, whoever made it."""

from __future__ import annotations

from dataclasses import dataclass

PLAIN = "plain"


@dataclass(frozen=True)
class Maker:
    """A program and the way it decodes."""

    program: str
    way: str = PLAIN

    @property
    def plain(self) -> Maker:
        """The same program without speculation."""
        return Maker(self.program)

    def __str__(self) -> str:
        return f"{self.program}, {self.way}"


@dataclass(frozen=True)
class TimedCompletion:
    """`maker` says who made it, `elapsed_s` the time from asking to the last token, reading the prompt included."""

    maker: Maker
    task_name: str
    temperature: float
    prompt_index: int
    token_ids: tuple[int, ...]
    elapsed_s: float

    @property
    def tokens_per_s(self) -> float:
        return len(self.token_ids) / self.elapsed_s
