"""A pass run in parts, between exits, is the pass; and rows may stay behind at an exit."""

from __future__ import annotations

import itertools

import pytest
import torch

from easyspec.model.row_layout import Segment, lay_out
from easyspec.parallel.layer_groups import LayerPlan, paper_plan, sequential_plan
from easyspec.speculation.parameters import MlpPlacement
from easyspec.speculation.token_tree import TokenTree
from tests.fakes.checkpoints import VOCAB_SIZE, write_checkpoint
from tests.model.passes import Passes, cached, random_token_ids

NUM_LAYERS = 6
EXITS = (2, 4, NUM_LAYERS)
PLANS = {
    "sequential": sequential_plan(NUM_LAYERS),
    "staged": paper_plan(NUM_LAYERS, 4, MlpPlacement.STAGED).cut_at(EXITS),
    "paper": paper_plan(NUM_LAYERS, 4, MlpPlacement.SEQUENTIAL).cut_at(EXITS),
}
TREE = TokenTree((5, 6, 7, 8), (0, 0, 1, 3))


@pytest.fixture(scope="module", params=["native", "reference"])
def passes(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Passes:
    folder = write_checkpoint(tmp_path_factory.mktemp("model"), num_hidden_layers=NUM_LAYERS)
    return Passes(folder, executor=request.param)


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS.keys())
@torch.inference_mode()
def test_parts_of_a_pass_are_the_pass(passes: Passes, plan: LayerPlan) -> None:
    """To the bit: logits, and keys and values of all layers."""
    decoder, pool, session = passes.decoder, passes.pool, passes.open()
    passes.run(session.chain(random_token_ids(20, VOCAB_SIZE)))
    layout = lay_out([session.tree(3, TREE)])
    rows = range(len(TREE) + 1)
    expected = decoder.forward(layout, pool, plan, rows).logits.clone()
    expected_kv = cached(pool, layout.rows.slots)
    for plane in (pool.keys, pool.values):
        plane[:, :, torch.from_numpy(layout.rows.slots)] = 0.5
    hidden = None
    for start, stop in itertools.pairwise((0, *EXITS)):
        hidden = decoder.forward_between(layout, pool, plan, range(start, stop), hidden)
        assert hidden.shape == (len(rows), passes.config.hidden_size)
    assert hidden is not None
    assert torch.equal(decoder.logits(hidden), expected)
    assert torch.equal(cached(pool, layout.rows.slots), expected_kv)
    session.close()


@torch.inference_mode()
def test_rows_that_stayed_behind_may_follow_in_another_pass(passes: Passes) -> None:
    """Rows of two passes through the first layers, and of one through the others, to the bit."""
    decoder, pool, plan = passes.decoder, passes.pool, PLANS["sequential"]
    tokens = random_token_ids(8, VOCAB_SIZE)
    whole = passes.open()
    expected = decoder.forward(lay_out([whole.chain(tokens)]), pool, plan, [7]).logits.clone()
    session, parts = passes.open(), []
    slots: list[int] = []
    for piece in (tokens[:5], tokens[5:]):
        segment = session.chain(piece)
        slots += segment.slots
        parts.append(decoder.forward_between(lay_out([segment]), pool, plan, range(EXITS[0])))
    both = Segment(tokens, range(8), slots, range(1, 9), session.slots.by_position)
    layers = range(EXITS[0], NUM_LAYERS)
    hidden = decoder.forward_between(lay_out([both]), pool, plan, layers, torch.cat(parts))
    assert torch.equal(decoder.logits(hidden[-1:]), expected)
    whole.close()
    session.close()
