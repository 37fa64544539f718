"""Layers with sliding windows, against transformers: whole texts, one token after the other, and trees."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from easyspec.speculation.token_tree import TokenTree
from tests.fakes.checkpoints import VOCAB_SIZE, reference_model, write_checkpoint
from tests.model.passes import Passes, random_token_ids

LENGTH = 300
CASES: dict[str, dict[str, Any]] = {
    "mistral": {"model_type": "mistral", "sliding_window": 24},
    "qwen2, its last layers": {
        "model_type": "qwen2",
        "use_sliding_window": True,
        "sliding_window": 24,
        "max_window_layers": 1,
    },
}


@pytest.fixture(params=CASES)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path, **CASES[request.param])


def expected(folder: Path, token_ids: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        return reference_model(folder, attn_implementation="eager")(torch.tensor([token_ids])).logits[0]


def test_a_text_far_longer_than_the_window(folder: Path) -> None:
    token_ids = random_token_ids(LENGTH, VOCAB_SIZE)
    passes = Passes(folder)
    assert passes.config.max_model_len == 512
    whole = passes.prefill(token_ids)
    assert torch.allclose(whole, expected(folder, token_ids), atol=2e-4)
    full = passes.prefill(token_ids[-24:])
    assert not torch.allclose(whole[-1], full[-1], atol=1e-2)  # earlier tokens reach the last by way of others


def test_decoding_and_trees_see_what_a_whole_text_does(folder: Path) -> None:
    token_ids = random_token_ids(LENGTH, VOCAB_SIZE)
    passes = Passes(folder)
    session = passes.open()
    passes.run(session.chain(token_ids[:-5]))
    (one,) = passes.run(session.chain(token_ids[-5:-4]))
    logits = expected(folder, token_ids)
    assert torch.allclose(one[0], logits[-5], atol=2e-4)
    other = (token_ids[-2] + 1) % VOCAB_SIZE
    tree = TokenTree((token_ids[-3], other, token_ids[-2]), (0, 1, 1))
    (rows,) = passes.run(session.tree(token_ids[-4], tree))
    assert torch.allclose(rows[1], logits[-3], atol=2e-4)
    assert torch.allclose(rows[3], logits[-2], atol=2e-4)
    assert torch.allclose(rows[2], expected(folder, [*token_ids[:-2], other])[-1], atol=2e-4)
    session.close()
