"""What was guessed in a round and which of it was right, for display."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from easyspec.speculation.token_tree import TokenTree
from gateway.decode_loop import Round


class TokenNamer(Protocol):
    """The text of one token alone."""

    def token_text(self, token_id: int) -> str: ...


@dataclass(frozen=True)
class RoundTrace:
    """The tree of a round, the text of each of its nodes, and the rows that were accepted, from the top down.

    The tree is empty if nothing was drafted. Of a round cut short by a stop string only what was emitted counts as
    accepted.
    """

    draft_tree: TokenTree
    draft_token_texts: tuple[str, ...]
    accepted_rows: tuple[int, ...]


def trace_of(round_: Round, num_accepted: int, namer: TokenNamer) -> RoundTrace:
    """The trace of a round of whose draft tokens the first `num_accepted` were emitted."""
    tree = round_.draft.tree
    return RoundTrace(
        draft_tree=tree,
        draft_token_texts=tuple(namer.token_text(token_id) for token_id in tree.token_ids),
        accepted_rows=round_.answer.verdict.accepted_rows[:num_accepted],
    )
