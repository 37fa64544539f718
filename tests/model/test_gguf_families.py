"""GGUF files of every architecture that is read say what transformers makes of the folder they were made of.

Tolerance: 2e-4 absolute, where logits reach 3 to 12.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from easyspec.model.gguf_families import GGUF_FAMILIES
from easyspec.model.loading import load_model
from easyspec.model.supported_models import GGUF_MODEL_TYPES
from tests.fakes.checkpoints import VOCAB_SIZE, reference_model, write_checkpoint
from tests.fakes.families import FAMILY_OPTIONS, VARIANTS
from tests.fakes.gguf_files import write_gguf
from tests.model.passes import Passes, random_token_ids
from tests.model.test_loading import Settings

TOLERANCE = 2e-4
TOKEN_IDS = random_token_ids(60, VOCAB_SIZE)
# What GGUF files do not say has the value that all models of the family have.
_FIXED: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"norm_topk_prob": True, "mlp_only_layers": [], "moe_intermediate_size": 64},
    "gpt_oss": {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    "gemma2": {"query_pre_attn_scalar": 32},
    "gemma3_text": {"query_pre_attn_scalar": 32, "layer_types": None},
    "mixtral": {"sliding_window": None},
    "starcoder2": {"sliding_window": None},
}
FAMILIES = {
    name: {**FAMILY_OPTIONS[name], **_FIXED.get(name, {})} for name in sorted({*GGUF_MODEL_TYPES.values(), "mixtral"})
}


def written(folder: Path, model_type: str, kind: str, **options: Any) -> Path:
    write_checkpoint(folder, model_type, **{k: v for k, v in options.items() if v is not None})
    return write_gguf(folder, folder / "tiny.gguf", kind)


def expected(folder: Path) -> torch.Tensor:
    with torch.inference_mode():
        logits: torch.Tensor = reference_model(folder, attn_implementation="eager")(torch.tensor([TOKEN_IDS])).logits[0]
    return logits


@pytest.mark.parametrize("model_type", FAMILIES)
@pytest.mark.parametrize("kind", ["F32", "Q4_1"])
def test_logits_are_those_of_the_checkpoint(tmp_path: Path, model_type: str, kind: str) -> None:
    path = written(tmp_path, model_type, kind, **FAMILIES[model_type])
    actual = Passes(path, executor="reference").prefill(TOKEN_IDS)
    assert (actual - expected(tmp_path)).abs().max() < TOLERANCE


def test_mxfp4_is_kept_and_computed(tmp_path: Path) -> None:
    path = written(tmp_path, "gpt_oss", "MXFP4", **FAMILIES["gpt_oss"])
    wanted = expected(tmp_path)
    assert (Passes(path, executor="reference").prefill(TOKEN_IDS) - wanted).abs().max() < TOLERANCE
    native = Passes(path)
    assert native.decoder.weight_format == "fp4"
    assert (native.prefill(TOKEN_IDS) - wanted).abs().max() < 0.01  # inputs are rounded to 16 bits


def test_factors_of_long_texts(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, **VARIANTS["phi3, longrope, short texts"])
    rope = VARIANTS["phi3, longrope, short texts"]["rope_parameters"]
    factors = {
        f"rope_factors_{kind}.weight": np.asarray(rope[f"{kind}_factor"], dtype=np.float32)
        for kind in ("short", "long")
    }
    path = write_gguf(tmp_path, tmp_path / "tiny.gguf", tensors=factors)
    passes = Passes(path, executor="reference")
    assert passes.config.max_model_len == 256
    assert (passes.prefill(TOKEN_IDS) - expected(tmp_path)).abs().max() < TOLERANCE


def test_every_tensor_is_used(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "gpt_oss", has_tokenizer=True, **FAMILIES["gpt_oss"])
    load_model(Settings(str(write_gguf(tmp_path, tmp_path / "tiny.gguf"))))


def test_the_table_of_those_who_must_not_load_torch_is_the_readers() -> None:
    assert {name: family.model_type for name, family in GGUF_FAMILIES.items() if name != "mixtral"} == GGUF_MODEL_TYPES
