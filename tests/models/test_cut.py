"""Layers that do nothing are left out first, and what is left computes the same."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from transformers import LlamaForCausalLM

from models.recipe.cut import adopt_tokenizer, calibration_windows, kept_layers, without_layers
from models.recipe.llama import TOKENIZER_FILES, build_llama
from models.recipe.settings import CutSettings, DistilSettings, ModelShape, OptimSettings, RecipeSettings

_SHAPE = ModelShape(
    hidden_size=16, num_layers=6, num_heads=2, num_kv_heads=1, head_dim=8, mlp_size=24, vocab_size=40, max_positions=64
)
_IDLE = (1, 4)
_WINDOWS = torch.arange(3 * 12).reshape(3, 12) % 40


def _base() -> LlamaForCausalLM:
    """A model of six layers, two of which add nothing."""
    model = build_llama(_SHAPE, 1).eval()
    with torch.no_grad():
        for index, layer in enumerate(model.model.layers):
            for matrix in (layer.self_attn.o_proj.weight, layer.mlp.down_proj.weight):
                matrix.mul_(0.0 if index in _IDLE else 20.0)
        model.lm_head.weight.mul_(20.0)
    return model


def test_layers_that_do_nothing_go_first_and_nothing_changes() -> None:
    base = _base()
    kept = kept_layers(base, _WINDOWS, 4)
    assert kept == [0, 2, 3, 5]
    small = without_layers(base, kept).eval()
    assert small.config.num_hidden_layers == 4
    with torch.inference_mode():
        torch.testing.assert_close(small(input_ids=_WINDOWS).logits, base(input_ids=_WINDOWS).logits)
        further = without_layers(base, kept_layers(base, _WINDOWS, 3))(input_ids=_WINDOWS).logits
    assert not torch.allclose(further, base(input_ids=_WINDOWS).logits, atol=1e-2)
    assert base.config.num_hidden_layers == 6


def test_calibration_windows_are_spread_over_the_corpus() -> None:
    settings = CutSettings(DistilSettings(OptimSettings(num_steps=1)), num_calibration_windows=4, calibration_tokens=10)
    windows = calibration_windows(np.arange(1_000, dtype=np.uint16), settings)
    assert windows.shape == (4, 10)
    assert windows[:, 0].tolist() == [0, 247, 494, 741]


def test_the_base_s_tokenizer_is_taken_and_one_of_the_run_s_own_is_kept(tmp_path: Path) -> None:
    settings = replace(RecipeSettings(), work=tmp_path)
    adopt_tokenizer(settings)
    for name in TOKENIZER_FILES:
        assert (tmp_path / "tokenizer" / name).read_bytes() == (settings.out / "base" / name).read_bytes()
    (tmp_path / "tokenizer" / TOKENIZER_FILES[0]).write_text("another")
    adopt_tokenizer(settings)
    assert (tmp_path / "tokenizer" / TOKENIZER_FILES[0]).read_text() == "another"
