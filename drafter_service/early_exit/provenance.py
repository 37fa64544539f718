"""Which nodes of a tree come from an early exit of the draft model, and which from all of its layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from easyspec.speculation.sources import DraftSources
from easyspec.speculation.token_tree import TokenTree


def told_apart(
    tree: TokenTree, node_sources: Sequence[DraftSources], model_tree: TokenTree, early_rows: Mapping[int, int]
) -> tuple[DraftSources, ...]:
    """`node_sources` of `tree` with the model's nodes named after the exit that guessed them.

    `early_rows` are the rows of the model's own, larger tree whose children an early exit named; nodes of the model are
    found there along their path.
    """
    if not early_rows:
        return tuple(node_sources)
    model_rows: list[int | None] = [0]
    named = []
    for token_id, parent_row, sources in zip(tree.token_ids, tree.parent_rows, node_sources, strict=True):
        above = model_rows[parent_row]
        model_rows.append(model_tree.child(above, token_id) if above is not None else None)
        if DraftSources.MODEL in sources and above in early_rows:
            sources = sources & ~DraftSources.MODEL | DraftSources.EARLY_EXIT
        named.append(sources)
    return tuple(named)
