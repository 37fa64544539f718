"""The decoder says what transformers says, for every family and option.

Tolerance: 1e-4 absolute, where logits reach 5 to 12; float32 sums in another order differ by about 1e-5.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.fakes.checkpoints import VOCAB_SIZE, reference_model, write_checkpoint
from tests.fakes.families import FAMILY_OPTIONS, VARIANTS
from tests.model.passes import Passes, random_token_ids, random_tree

TOLERANCE = 1e-4
_ROPE = {"rope_theta": 10000.0}
CHECKPOINTS: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama without GQA": {"num_key_value_heads": 4},
    "llama with one KV head": {"num_key_value_heads": 1},
    "llama, tied": {"tie_word_embeddings": True},
    "llama, head_dim": {"head_dim": 24},
    "llama, biases": {"attention_bias": True, "mlp_bias": True},
    "llama, shards": {"max_shard_size": "60KB"},
    "llama, llama3": {
        "rope_parameters": {
            **_ROPE,
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        }
    },
    "llama, linear": {"rope_parameters": {**_ROPE, "rope_type": "linear", "factor": 4.0}},
    "llama, dynamic": {"rope_parameters": {**_ROPE, "rope_type": "dynamic", "factor": 4.0}},
    "llama, yarn": {
        "rope_parameters": {**_ROPE, "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
    },
    "llama, rope_theta": {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
    "mistral": {"model_type": "mistral"},
    "mistral, window": {"model_type": "mistral", "sliding_window": 50},
    "qwen2, windows": {
        "model_type": "qwen2",
        "sliding_window": 30,
        "use_sliding_window": True,
        "max_window_layers": 1,
    },
    "qwen2": {"model_type": "qwen2"},
    "qwen2, tied": {"model_type": "qwen2", "tie_word_embeddings": True},
    "qwen3": {"model_type": "qwen3", "head_dim": 32},
    "qwen3, biases": {"model_type": "qwen3", "head_dim": 16, "attention_bias": True, "num_key_value_heads": 4},
    **{f"{name}, small": {"model_type": name, **options} for name, options in FAMILY_OPTIONS.items()},
    **VARIANTS,
}
TOKEN_IDS = random_token_ids(200, VOCAB_SIZE)


@pytest.fixture(scope="module", params=CHECKPOINTS)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint"), **CHECKPOINTS[request.param])


@pytest.fixture(scope="module")
def reference(checkpoint: Path) -> Any:
    return reference_model(checkpoint)


@pytest.fixture(scope="module")
def expected(reference: Any) -> torch.Tensor:
    return logits_of(reference, TOKEN_IDS)


@pytest.fixture(scope="module", params=["native", "reference"])
def passes(checkpoint: Path, request: pytest.FixtureRequest) -> Passes:
    return Passes(checkpoint, executor=request.param)


@torch.inference_mode()
def logits_of(model: Any, token_ids: list[int]) -> torch.Tensor:
    logits: torch.Tensor = model(torch.tensor([token_ids])).logits[0].float()
    return logits


def assert_close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = TOLERANCE) -> None:
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=0.0)


def test_prefill(passes: Passes, expected: torch.Tensor) -> None:
    assert 3.0 < expected.abs().max() < 20.0
    assert_close(passes.prefill(TOKEN_IDS), expected)
    assert passes.memory.num_used_slots == 0


def test_decoding_row_by_row_after_a_prompt_in_chunks(passes: Passes, expected: torch.Tensor) -> None:
    session = passes.open()
    logits = []
    for count in (50, 70, *[1] * 12, 61):
        start = session.slots.num_cached
        logits += passes.run(session.chain(TOKEN_IDS[start : start + count]))
    session.close()
    actual = torch.cat(logits)
    assert_close(actual, expected[: len(actual)])


def test_a_tree_is_every_path_alone(passes: Passes, reference: Any) -> None:
    length = 124
    tree, _ = random_tree(30, VOCAB_SIZE, seed=1, path=TOKEN_IDS[length + 1 : length + 9])
    session = passes.open()
    passes.run(session.chain(TOKEN_IDS[:length]))
    (logits,) = passes.run(session.tree(TOKEN_IDS[length], tree))
    session.close()
    inner = set(tree.parent_rows)
    for leaf in (row for row in range(len(tree) + 1) if row not in inner):
        rows = [0, *tree.path_rows(leaf)]
        path = [tree.token_ids[row - 1] for row in rows[1:]]
        alone = logits_of(reference, [*TOKEN_IDS[: length + 1], *path])
        assert_close(logits[rows], alone[length:])


def test_sessions_in_one_pass_do_not_see_each_other(passes: Passes, expected: torch.Tensor, reference: Any) -> None:
    other_ids = random_token_ids(40, VOCAB_SIZE, seed=2)
    first, second = passes.open(), passes.open()
    one, other = passes.run(first.chain(TOKEN_IDS[:140]), second.chain(other_ids))
    first.close()
    second.close()
    assert_close(one, expected[:140])
    assert_close(other, logits_of(reference, other_ids))


def test_parameters_of_matrices_are_counted(passes: Passes, reference: Any) -> None:
    matrices = (value for name, value in reference.named_parameters() if not name.endswith("bias"))
    counts = [value.numel() for value in matrices if value.dim() > 1]
    assert passes.decoder.num_parameters == sum(counts)


def test_the_whole_context_of_dynamic_scaling(tmp_path: Path) -> None:
    """Scaling sets in beyond the checkpoint's own context, which is where we end."""
    write_checkpoint(tmp_path, **CHECKPOINTS["llama, dynamic"], max_position_embeddings=200)
    passes = Passes(tmp_path)
    assert passes.config.max_model_len == 200
    assert_close(passes.prefill(TOKEN_IDS), logits_of(reference_model(tmp_path), TOKEN_IDS))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("executor", ["native", "reference"])
def test_half_types_are_as_close_as_transformers_is(tmp_path: Path, model_type: str, dtype: str, executor: str) -> None:
    """Against the same weights computed in float32, at most 1.5 times the mean error of transformers' own pass."""
    torch_dtype = getattr(torch, dtype)
    write_checkpoint(tmp_path, model_type, dtype=torch_dtype)
    passes = Passes(tmp_path, executor=executor)
    assert passes.config.dtype == passes.pool.keys.dtype == torch_dtype
    token_ids = TOKEN_IDS[:140]
    expected = logits_of(reference_model(tmp_path), token_ids)
    error = (passes.prefill(token_ids) - expected).abs()
    usual_error = (logits_of(reference_model(tmp_path, torch_dtype), token_ids) - expected).abs()
    assert usual_error.mean() > 1e-4  # the type is really the one that computes
    assert error.mean() < 1.5 * usual_error.mean()
    assert error.max() < 2.0 * usual_error.max()


def test_another_type_than_the_checkpoints(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, dtype=torch.bfloat16)
    passes = Passes(tmp_path, dtype="float32")
    assert passes.pool.keys.dtype == torch.float32
    assert_close(passes.prefill(TOKEN_IDS), logits_of(reference_model(tmp_path), TOKEN_IDS))
