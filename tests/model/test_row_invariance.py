"""A token's logits are the same bits however it is computed: this is what makes speculation lossless."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from easyspec.model.linear import FALLBACK_TILE_ROWS, Linear
from easyspec.model.row_layout import MAX_TREE_COLUMNS
from easyspec.model.row_probe import make_row_invariant
from easyspec.speculation.token_tree import EMPTY_TREE, TokenTree
from tests.fakes.checkpoints import write_checkpoint
from tests.model.passes import Passes, random_token_ids, random_tree

_NUM_TOKENS = 270
# The last two have products above and below the size from which weights are prepacked.
CHECKPOINTS: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {"model_type": "qwen2", "num_key_value_heads": 1},
    "qwen3": {"model_type": "qwen3", "head_dim": 32},
    "deep": {"hidden_size": 160, "vocab_size": 4096, "num_hidden_layers": 8, "intermediate_size": 432, "std": 0.08},
    "wide": {"hidden_size": 512, "vocab_size": 1100, "num_hidden_layers": 1, "intermediate_size": 1100, "std": 0.05},
}


@pytest.fixture(scope="module", params=CHECKPOINTS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint"), **CHECKPOINTS[request.param])


@pytest.fixture(scope="module")
def passes(folder: Path) -> Passes:
    passes = Passes(folder, is_exact=True)
    assert make_row_invariant(passes.decoder, passes.pool) is True
    assert passes.memory.num_used_slots == 0
    return passes


@pytest.fixture(scope="module")
def token_ids(passes: Passes) -> list[int]:
    return random_token_ids(_NUM_TOKENS, passes.config.vocab_size)


@pytest.fixture(scope="module")
def expected(passes: Passes, token_ids: list[int]) -> torch.Tensor:
    """Logits of the whole text as one prompt."""
    return passes.prefill(token_ids)


@pytest.mark.parametrize("seed", range(3))
def test_chunks_of_any_size_beside_any_sessions(
    passes: Passes, token_ids: list[int], expected: torch.Tensor, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    session = passes.open()
    while (start := session.slots.num_cached) < _NUM_TOKENS:
        chunk = token_ids[start : start + int(rng.choice([1, 1, 2, 3, 5, 8, 17, 60, 130]))]
        others = [passes.open() for _ in range(rng.integers(0, 4))]
        segments = [
            other.chain(random_token_ids(int(rng.integers(1, 40)), passes.config.vocab_size, seed)) for other in others
        ]
        place = int(rng.integers(0, len(others) + 1))
        segments.insert(place, session.chain(chunk))
        logits = passes.run(*segments)[place]
        for other in others:
            other.close()
        assert torch.equal(logits, expected[start : start + len(chunk)]), f"rows {start} to {start + len(chunk)}"
    session.close()


def _check_tree(passes: Passes, token_ids: list[int], expected: torch.Tensor, length: int) -> None:
    """The text's next tokens as a path among distractors, after `length` tokens, beside another session's tree."""
    rng = np.random.default_rng(length)
    num_nodes = int(rng.integers(12, MAX_TREE_COLUMNS + 1))
    path = token_ids[length + 1 : length + 1 + int(rng.integers(1, 12))]
    tree, rows = random_tree(num_nodes, passes.config.vocab_size, length, path)
    session, other = passes.open(), passes.open()
    passes.run(session.chain(token_ids[:length]))
    passes.run(other.chain(token_ids[: int(rng.integers(1, 60))]))
    other_tree, _ = random_tree(int(rng.integers(1, 30)), passes.config.vocab_size, length + 1)
    (alone,) = passes.run(session.tree(token_ids[length], tree))
    session.drop_tree()
    _, beside = passes.run(other.tree(token_ids[0], other_tree), session.tree(token_ids[length], tree))
    session.close()
    other.close()
    for logits in (alone, beside):
        assert torch.equal(logits[rows], expected[length : length + len(rows)]), f"tree at {length}"


@pytest.mark.parametrize("length", [1, 40, *range(118, 137, 2), 127, *range(248, 260, 2), 255])
def test_trees_with_distractors(passes: Passes, token_ids: list[int], expected: torch.Tensor, length: int) -> None:
    _check_tree(passes, token_ids, expected, length)


def test_plain_decoding_is_the_empty_tree(passes: Passes, token_ids: list[int], expected: torch.Tensor) -> None:
    session = passes.open()
    passes.run(session.chain(token_ids[:120]))
    for position in range(120, 136):
        (logits,) = passes.run(session.tree(token_ids[position], EMPTY_TREE))
        assert torch.equal(logits, expected[position : position + 1])
    session.close()


@torch.inference_mode()
def test_the_head_takes_any_number_of_rows(passes: Passes) -> None:
    """Odd and small row counts are where products differ: a verdict on an empty tree is a single row."""
    hidden = torch.randn(70, passes.config.hidden_size, generator=torch.Generator().manual_seed(0))
    expected = passes.decoder.logits(hidden)
    for count in range(1, 40):
        assert torch.equal(passes.decoder.logits(hidden[:count]), expected[:count]), f"{count} rows"


def test_two_threads(folder: Path, token_ids: list[int]) -> None:
    """Threads share a product's rows out: more row counts are odd then."""
    torch.set_num_threads(2)
    try:
        passes = Passes(folder, is_exact=True)
        assert make_row_invariant(passes.decoder, passes.pool) is True
        expected = passes.prefill(token_ids)
        for length in (40, 125):
            _check_tree(passes, token_ids, expected, length)
    finally:
        torch.set_num_threads(1)


def test_a_tree_costs_no_slot(passes: Passes) -> None:
    session = passes.open()
    passes.run(session.tree(1, TokenTree((2, 3), (0, 0))))
    assert passes.memory.num_used_slots == 3
    session.drop_tree()
    assert passes.memory.num_used_slots == session.slots.num_cached == 0
    session.close()


def test_the_probe_sees_attention_that_depends_on_other_rows(folder: Path) -> None:
    passes = Passes(folder, is_exact=False)
    assert make_row_invariant(passes.decoder, passes.pool) is False
    assert passes.memory.num_used_slots == 0


Product = Callable[..., torch.Tensor]


def _replace_product(
    monkeypatch: pytest.MonkeyPatch, wrong: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
) -> None:
    """Every plain product from now on is `wrong(inputs, product)`."""
    right: Product = torch.nn.functional.linear
    monkeypatch.setattr("easyspec.model.linear._packed_product", lambda weight, bias: None)
    monkeypatch.setattr(
        "easyspec.model.linear.functional.linear", lambda x, weight, bias=None: wrong(x, right(x, weight, bias))
    )


def _by_row_count(rows: torch.Tensor, product: torch.Tensor) -> torch.Tensor:
    return product * (1.0 + 1e-6 * rows.shape[0])


def _by_neighbours(rows: torch.Tensor, product: torch.Tensor) -> torch.Tensor:
    return product + 1e-6 * rows.abs().mean()


def test_products_that_depend_on_the_row_count_are_tiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _replace_product(monkeypatch, _by_row_count)
    passes = Passes(write_checkpoint(tmp_path), is_exact=True)
    assert all(linear.tile_rows is None for linear in passes.decoder.linears())
    assert make_row_invariant(passes.decoder, passes.pool) is True
    assert all(linear.tile_rows == FALLBACK_TILE_ROWS for linear in passes.decoder.linears())
    token_ids = random_token_ids(_NUM_TOKENS, passes.config.vocab_size)
    expected = passes.prefill(token_ids)
    for length in (100, 125, 252):
        _check_tree(passes, token_ids, expected, length)


def test_the_probe_sees_products_that_tiles_do_not_cure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _replace_product(monkeypatch, _by_neighbours)
    passes = Passes(write_checkpoint(tmp_path), is_exact=True)
    assert make_row_invariant(passes.decoder, passes.pool) is False


@pytest.mark.parametrize("num_slots", [300, 384])
def test_a_pool_too_small_to_probe_promises_nothing(tmp_path: Path, num_slots: int) -> None:
    """A prompt of 131 tokens is held up to three times."""
    passes = Passes(write_checkpoint(tmp_path), is_exact=True, num_slots=num_slots)
    assert make_row_invariant(passes.decoder, passes.pool) is False


def test_the_probe_fits_a_short_context(tmp_path: Path) -> None:
    passes = Passes(write_checkpoint(tmp_path, max_position_embeddings=32), is_exact=True)
    assert make_row_invariant(passes.decoder, passes.pool) is True


@pytest.mark.parametrize("seed", range(2))
def test_a_linear_is_the_plain_product(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for num_outputs, num_inputs in ((7, 5), (1024, 600)):  # plain and prepacked
        weight = torch.randn(num_outputs, num_inputs, generator=generator)
        bias = torch.randn(num_outputs, generator=generator) if seed else None
        rows = torch.randn(37, num_inputs, generator=generator)
        linear = Linear(weight, bias)
        expected = torch.nn.functional.linear(rows, weight, bias)
        torch.testing.assert_close(linear(rows), expected, atol=1e-3, rtol=1e-5)
        linear.tile_rows = FALLBACK_TILE_ROWS
        tiled = linear(rows)
        assert tiled.shape == expected.shape
        torch.testing.assert_close(tiled, expected, atol=1e-3, rtol=1e-5)


def test_a_linear_tells_whether_rows_depend_on_their_number(monkeypatch: pytest.MonkeyPatch) -> None:
    _replace_product(monkeypatch, _by_row_count)
    linear = Linear(torch.randn(6, 8))
    assert not linear.is_row_invariant((1, 4, 32))
    linear.tile_rows = 16
    assert linear.is_row_invariant((1, 4, 32))
