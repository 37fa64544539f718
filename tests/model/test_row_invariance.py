"""A token's logits are the same bits however it is computed: this is what makes speculation lossless."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from easyspec.model.row_probe import is_row_invariant
from easyspec.model.weight_reader import WeightFormat
from easyspec.ops.native import NativeExecutor
from easyspec.ops.reference import ReferenceWeight
from easyspec.speculation.token_tree import EMPTY_TREE, TokenTree
from tests.fakes.checkpoints import write_checkpoint
from tests.fakes.families import FAMILY_OPTIONS
from tests.model.passes import Passes, random_token_ids, random_tree
from tests.ops.small_model import PATHS

_NUM_TOKENS = 270
# Families whose operations others lack.
PECULIAR = ("qwen3_moe", "gpt_oss", "gemma2", "olmo2", "cohere2", "glm4", "starcoder2", "hunyuan_v1_dense")
CHECKPOINTS: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {"model_type": "qwen2", "num_key_value_heads": 1},
    "qwen3": {"model_type": "qwen3", "head_dim": 32},
    "deep": {"hidden_size": 160, "vocab_size": 4096, "num_hidden_layers": 8, "intermediate_size": 432, "std": 0.08},
    **{f"{name}, small": {"model_type": name, **FAMILY_OPTIONS[name]} for name in PECULIAR},
    "wide": {"hidden_size": 512, "vocab_size": 1100, "num_hidden_layers": 1, "intermediate_size": 1100, "std": 0.05},
}
_ROUNDED = [{"weights": WeightFormat.INT8}, {"weights": WeightFormat.INT4}]
_FORMATS = ["bfloat16", "float16", "int8", "int4"]


@pytest.fixture(scope="module", params=CHECKPOINTS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint"), **CHECKPOINTS[request.param])


@pytest.fixture(scope="module", params=["auto", "reference"])
def passes(folder: Path, request: pytest.FixtureRequest) -> Passes:
    passes = Passes(folder, executor=request.param)
    assert is_row_invariant(passes.decoder, passes.pool) is True
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
    num_nodes = int(rng.integers(12, 65))
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


@pytest.mark.parametrize("length", [1, 40, 127, *range(248, 260, 2), 255])
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
    """A verdict on an empty tree is a single row."""
    hidden = torch.randn(70, passes.config.hidden_size, generator=torch.Generator().manual_seed(0))
    expected = passes.decoder.logits(hidden).clone()
    for count in range(1, 40):
        assert torch.equal(passes.decoder.logits(hidden[:count]), expected[:count]), f"{count} rows"


@pytest.mark.skipif(not PATHS, reason="the library was not built")
@pytest.mark.parametrize("num_threads", [1, 2])
@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.name.lower())
def test_every_code_path_and_two_threads(folder: Path, token_ids: list[int], num_threads: int, path: Any) -> None:
    """The same bits by any number of threads; code paths have bits of their own."""
    alone = Passes(folder, executor=NativeExecutor(1, path))
    passes = Passes(folder, executor=NativeExecutor(num_threads, path))
    assert is_row_invariant(passes.decoder, passes.pool) is True
    expected = alone.prefill(token_ids)
    assert torch.equal(passes.prefill(token_ids), expected)
    for length in (40, 250):
        _check_tree(passes, token_ids, expected, length)


@pytest.mark.parametrize("executor", ["auto", "native-8bit", "reference"])
@pytest.mark.parametrize("options", [{"dtype": "bfloat16"}, {"dtype": "float16"}, *_ROUNDED], ids=_FORMATS)
def test_every_format(tmp_path: Path, options: dict[str, Any], executor: str) -> None:
    passes = Passes(write_checkpoint(tmp_path), executor=executor, **options)
    assert is_row_invariant(passes.decoder, passes.pool) is True
    token_ids = random_token_ids(_NUM_TOKENS, passes.config.vocab_size)
    expected = passes.prefill(token_ids)
    for length in (1, 60, 252):
        _check_tree(passes, token_ids, expected, length)


def test_a_tree_costs_no_slot(passes: Passes) -> None:
    session = passes.open()
    passes.run(session.tree(1, TokenTree((2, 3), (0, 0))))
    assert passes.memory.num_used_slots == 3
    session.drop_tree()
    assert passes.memory.num_used_slots == session.slots.num_cached == 0
    session.close()


def test_the_probe_sees_products_that_depend_on_the_other_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = ReferenceWeight.__call__
    monkeypatch.setattr(ReferenceWeight, "__call__", lambda self, rows: right(self, rows) * (1 + 1e-6 * len(rows)))
    passes = Passes(write_checkpoint(tmp_path), executor="reference")
    assert is_row_invariant(passes.decoder, passes.pool) is False
    assert passes.memory.num_used_slots == 0


@pytest.mark.parametrize("num_slots", [300, 776])
def test_a_pool_too_small_to_probe_promises_nothing(tmp_path: Path, num_slots: int) -> None:
    """A prompt of 259 tokens is held up to three times."""
    passes = Passes(write_checkpoint(tmp_path), num_slots=num_slots)
    assert is_row_invariant(passes.decoder, passes.pool) is False


def test_the_probe_fits_a_short_context(tmp_path: Path) -> None:
    passes = Passes(write_checkpoint(tmp_path, max_position_embeddings=32))
    assert is_row_invariant(passes.decoder, passes.pool) is True
