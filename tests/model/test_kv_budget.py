from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from easyspec.errors import ConfigurationError
from easyspec.model import kv_budget
from easyspec.model.config import ModelConfig
from easyspec.model.kv_budget import context_within, free_bytes, num_pool_slots
from easyspec.model.layer_spec import ModelSpec, NormSpec
from easyspec.ops.kv_pool import KVPool

CPU = torch.device("cpu")
CONFIG = ModelConfig(
    vocab_size=10,
    hidden_size=8,
    num_layers=2,
    num_heads=2,
    num_kv_heads=2,
    head_dim=4,
    intermediate_size=8,
    max_model_len=64,
    tie_word_embeddings=False,
    eos_token_ids=(),
    dtype=torch.float32,
    hf_config=None,
    spec=ModelSpec((), NormSpec(1e-6)),
)

LARGE = replace(CONFIG, num_layers=80, num_kv_heads=8, head_dim=128, max_model_len=4096)


def test_a_pool_is_as_large_as_the_setting_says() -> None:
    assert num_pool_slots(CONFIG, CPU, 77, 0.5) == 77
    assert num_pool_slots(CONFIG, CPU, 77, None, 3.0) == 77
    assert num_pool_slots(LARGE, CPU, None, 0.5, 3.0) == 3 * 2**30 // KVPool.slot_bytes(80, 8, 128, torch.float32)


def test_without_a_setting_a_large_models_pool_is_a_share_of_free_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_budget, "free_bytes", lambda device: 10 * 2**30)
    slot_bytes = KVPool.slot_bytes(80, 8, 128, LARGE.dtype)
    assert num_pool_slots(LARGE, CPU, None, None) == 2 * 2**30 // slot_bytes
    assert num_pool_slots(LARGE, CPU, None, 0.5) == 5 * 2**30 // slot_bytes


def test_a_small_models_pool_is_no_larger_than_a_cpu_can_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_budget, "free_bytes", lambda device: 10 * 2**30)
    assert num_pool_slots(CONFIG, CPU, None, None) == 32_768
    assert num_pool_slots(replace(CONFIG, max_model_len=10_000), CPU, None, None) == 40_000


def test_free_memory_is_that_of_the_container(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(kv_budget, "_CGROUP", tmp_path)
    of_the_machine = free_bytes(CPU)
    assert of_the_machine > 2**20
    (tmp_path / "memory.current").write_text("1000\n")
    (tmp_path / "memory.max").write_text("max\n")
    assert free_bytes(CPU) > 2**20
    (tmp_path / "memory.max").write_text("5000\n")
    assert free_bytes(CPU) == 4000


def test_the_context_is_what_fits_beside_a_tree() -> None:
    assert context_within(1000, 16, CONFIG, None) == 64
    assert context_within(50, 16, CONFIG, None) == 34
    assert context_within(50, 16, replace(CONFIG, max_model_len=34), 34) == 34
    with pytest.raises(ConfigurationError, match="num_kv_slots is 49; allowed: at least 50, for max_model_len 34"):
        context_within(49, 16, replace(CONFIG, max_model_len=34), 34)
    with pytest.raises(ConfigurationError, match="num_kv_slots is 17; allowed: at least 18"):
        context_within(17, 16, CONFIG, None)
