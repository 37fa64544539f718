"""The acceptance walk: what a tree and the base model's choices at its rows make of a round."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
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


def judge(tree: TokenTree, choices: Sequence[int], base_length: int, limits: StopLimits) -> Verdict:
    """Walk from the root along the tokens the base model chose (`choices`, one per row, root first).

    A child that carries its parent's choice is accepted; the first choice without a child is the bonus token and
    ends the walk. A stop token is emitted and ends it, the length limit ends it too, and a stop on the last token
    that fits counts as a stop. `base_length` committed tokens must leave room for one more.
    """
    assert len(choices) == len(tree) + 1, f"{len(choices)} choices for {len(tree) + 1} rows"
    assert base_length < limits.max_total_length, f"no room after {base_length} of {limits.max_total_length} tokens"
    token_ids: list[int] = []
    accepted_rows: list[int] = []
    finish_reason = None
    row: int | None = 0
    while row is not None and finish_reason is None:
        token_id = choices[row]
        token_ids.append(token_id)
        row = tree.children[row].get(token_id)
        if row is not None:
            accepted_rows.append(row)
        if token_id in limits.stop_token_ids:
            finish_reason = FinishReason.STOP
        elif base_length + len(token_ids) == limits.max_total_length:
            finish_reason = FinishReason.LENGTH
    matched_stop_token_id = token_ids[-1] if finish_reason is FinishReason.STOP else None
    return Verdict(base_length, tuple(token_ids), tuple(accepted_rows), finish_reason, matched_stop_token_id)
