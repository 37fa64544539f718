"""Hypothesis strategies for trees and sampling parameters."""

from __future__ import annotations

from hypothesis import strategies as st

from easyspec.speculation.parameters import MAX_SEED, SamplingParameters
from easyspec.speculation.token_tree import TokenTree


@st.composite
def token_trees(draw: st.DrawFn, vocab_size: int, max_nodes: int = 12) -> TokenTree:
    """Well-formed trees of any shape."""
    token_ids: list[int] = []
    parent_rows: list[int] = []
    taken: set[tuple[int, int]] = set()
    for _ in range(draw(st.integers(0, max_nodes))):
        parent_row = draw(st.integers(0, len(token_ids)))
        token_id = draw(st.integers(0, vocab_size - 1))
        if (parent_row, token_id) not in taken:
            taken.add((parent_row, token_id))
            token_ids.append(token_id)
            parent_rows.append(parent_row)
    return TokenTree(tuple(token_ids), tuple(parent_rows))


def sampling_parameters(vocab_size: int) -> st.SearchStrategy[SamplingParameters]:
    """Every knob at its default, at its limits and in between."""
    return st.builds(
        SamplingParameters,
        seed=st.one_of(st.sampled_from([0, 2**63 - 1, 2**63, MAX_SEED]), st.integers(0, MAX_SEED)),
        temperature=st.one_of(st.sampled_from([0.0, 1.0, 5e-324, 1e-30, 100.0]), st.floats(0.05, 3.0)),
        top_k=st.one_of(st.none(), st.integers(1, vocab_size + 2)),
        top_p=st.one_of(st.sampled_from([1.0, 1e-300, 1.0 - 2.0**-53]), st.floats(0.01, 1.0)),
        min_p=st.one_of(st.sampled_from([0.0, 1.0, 1e-300]), st.floats(0.0, 1.0)),
        repetition_penalty=st.one_of(st.sampled_from([1.0, 1e-6, 100.0]), st.floats(0.5, 2.0)),
        presence_penalty=st.one_of(st.just(0.0), st.floats(-2.0, 2.0)),
        frequency_penalty=st.one_of(st.just(0.0), st.floats(-2.0, 2.0)),
        logit_bias=st.dictionaries(st.integers(0, vocab_size - 1), st.floats(-100.0, 100.0), max_size=3),
    )
