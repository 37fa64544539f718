"""The acceptance walk: what a tree and the base model's choices at its rows make of a round."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from easyspec.speculation.messages import Verdict
from easyspec.speculation.parameters import FinishReason, StopConditions
from easyspec.speculation.token_tree import TokenTree


@dataclass(frozen=True)
class StopLimits:
    """When decoding ends: every token id that stops, and the most tokens of prompt and output together."""

    stop_token_ids: frozenset[int]
    max_total_length: int


def stop_limits(
    stop: StopConditions, num_prompt_tokens: int, eos_token_ids: Iterable[int], max_model_len: int
) -> StopLimits:
    """A request's stop conditions against the model's end-of-sequence ids and context length."""
    stop_token_ids = stop.stop_token_ids if stop.ignore_eos else stop.stop_token_ids.union(eos_token_ids)
    if stop.max_tokens is None:
        return StopLimits(stop_token_ids, max_model_len)
    return StopLimits(stop_token_ids, min(num_prompt_tokens + stop.max_tokens, max_model_len))


class Walk:
    """The walk over one tree, one choice at a time, for callers that can only choose where it comes by.

    `row` is the row whose choice is wanted next, None once the walk is over. A child that carries its parent's
    choice is accepted; the first choice without a child is the bonus token and ends the walk. A stop token is
    emitted and ends it, the length limit ends it too, and a stop on the last token that fits counts as a stop.
    `base_length` committed tokens must leave room for one more.
    """

    def __init__(self, tree: TokenTree, base_length: int, limits: StopLimits) -> None:
        assert base_length < limits.max_total_length, f"no room after {base_length} of {limits.max_total_length} tokens"
        self._children = tree.children
        self._base_length = base_length
        self._limits = limits
        self._token_ids: list[int] = []
        self._accepted_rows: list[int] = []
        self.row: int | None = 0
        self.finish_reason: FinishReason | None = None

    @property
    def visited_rows(self) -> tuple[int, ...]:
        """The rows whose choices were taken, in order: one per token."""
        return (0, *self._accepted_rows)[: len(self._token_ids)]

    def step(self, token_id: int) -> None:
        assert self.row is not None, "the walk is not over"
        self._token_ids.append(token_id)
        child = self._children[self.row].get(token_id)
        if child is not None:
            self._accepted_rows.append(child)
        if token_id in self._limits.stop_token_ids:
            self.finish_reason = FinishReason.STOP
        elif self._base_length + len(self._token_ids) == self._limits.max_total_length:
            self.finish_reason = FinishReason.LENGTH
        self.row = child if self.finish_reason is None else None

    def verdict(self) -> Verdict:
        assert self.row is None, "the walk is over"
        matched_stop_token_id = self._token_ids[-1] if self.finish_reason is FinishReason.STOP else None
        return Verdict(
            self._base_length,
            tuple(self._token_ids),
            tuple(self._accepted_rows),
            self.finish_reason,
            matched_stop_token_id,
        )
