"""Widening must change a model's cost and nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from models.recipe.widen import WidenSettings, wide_config, widen_checkpoint, widen_model

_TOKENS = torch.arange(2 * 37).reshape(2, 37) % 101


def _small(*, tied: bool) -> LlamaForCausalLM:
    torch.manual_seed(5)
    config = LlamaConfig(
        vocab_size=101,
        hidden_size=24,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        intermediate_size=40,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
        initializer_range=0.3,
    )
    model = LlamaForCausalLM(config).eval()
    for name, param in model.named_parameters():
        if name.endswith("norm.weight"):
            nn.init.uniform_(param, 0.5, 1.5)
    return model


def _logits(model: LlamaForCausalLM) -> torch.Tensor:
    with torch.inference_mode():
        logits: torch.Tensor = model(input_ids=_TOKENS).logits
    return logits


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("factor", "num_extra_layers"), [(1, 2), (2, 0), (3, 5)])
def test_widened_model_computes_the_same_logits(tied: bool, factor: int, num_extra_layers: int) -> None:
    small = _small(tied=tied)
    wide = widen_model(small, WidenSettings(factor=factor, num_extra_layers=num_extra_layers))
    torch.testing.assert_close(_logits(wide), _logits(small), atol=1e-4, rtol=1e-4)


def test_widened_model_is_as_large_as_asked() -> None:
    small = _small(tied=True)
    wide = widen_model(small, WidenSettings(factor=4, num_extra_layers=3))
    assert wide.config.num_hidden_layers == 6
    assert wide.config.hidden_size == 96
    assert wide.config.num_attention_heads == 16
    assert wide.config.num_key_value_heads == 8
    assert wide.config.head_dim == 8
    assert wide.num_parameters() > 16 * small.num_parameters()


def test_new_units_compute_on_real_weights() -> None:
    wide = widen_model(_small(tied=True), WidenSettings(factor=2, num_extra_layers=1))
    for name, param in wide.named_parameters():
        if name.endswith(("q_proj.weight", "k_proj.weight", "gate_proj.weight")):
            assert torch.count_nonzero(param) > 0.99 * param.numel(), name


def test_checkpoint_survives_the_disk(tmp_path: Path) -> None:
    small = _small(tied=True)
    small.save_pretrained(tmp_path / "small")
    settings = WidenSettings(factor=2, num_extra_layers=1)
    num_params = widen_checkpoint(tmp_path / "small", tmp_path / "wide", settings)
    wide = LlamaForCausalLM.from_pretrained(tmp_path / "wide", dtype=torch.float32).eval()
    assert wide.num_parameters() == num_params
    torch.testing.assert_close(_logits(wide), _logits(small), atol=1e-4, rtol=1e-4)


def test_a_factor_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match="factor must be at least 1"):
        wide_config(_small(tied=True).config, WidenSettings(factor=0))
