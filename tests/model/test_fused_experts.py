"""gpt-oss's experts, one tensor a layer: dense as transformers saves them, and in MXFP4 as they are published.

Tolerance: 2e-4 absolute, where logits reach 6.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from easyspec.errors import ConfigurationError
from easyspec.model.config import load_config
from easyspec.model.loading import load_model
from easyspec.model.weight_source import open_weights
from easyspec.parallel.rank_placement import RankPlacement
from easyspec.parallel.ranks import SingleRank
from tests.fakes.checkpoints import VOCAB_SIZE, change_tensor, reference_model, write_checkpoint
from tests.fakes.families import FAMILY_OPTIONS
from tests.model.passes import Passes, random_token_ids
from tests.model.test_loading import Settings

TOKEN_IDS = random_token_ids(60, VOCAB_SIZE)


def write_mxfp4(folder: Path, reference: Path) -> Path:
    """Random MXFP4 experts in `folder`, and in `reference` the dense checkpoint that they stand for."""
    write_checkpoint(folder, "gpt_oss", has_tokenizer=True, **FAMILY_OPTIONS["gpt_oss"])
    shutil.copytree(folder, reference)
    generator = torch.Generator().manual_seed(3)
    dense = load_file(folder / "model.safetensors")
    stored = dict(dense)
    for name, tensor in dense.items():
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            experts, inputs, outputs = tensor.shape
            blocks = torch.randint(0, 256, (experts, outputs, inputs // 32, 16), generator=generator, dtype=torch.uint8)
            scales = torch.randint(122, 125, blocks.shape[:-1], generator=generator, dtype=torch.uint8)
            dense[name] = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32).contiguous()
            del stored[name]
            stored |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    save_file(dense, reference / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    quantization = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}))
    return folder


def test_experts_in_mxfp4(tmp_path: Path) -> None:
    folder = write_mxfp4(tmp_path / "packed", tmp_path / "dense")
    with torch.inference_mode():
        expected = reference_model(tmp_path / "dense", attn_implementation="eager")(torch.tensor([TOKEN_IDS])).logits[0]
    assert expected.abs().max() > 3.0
    assert (Passes(folder, executor="reference").prefill(TOKEN_IDS) - expected).abs().max() < 2e-4
    native = Passes(folder)
    assert native.decoder.weight_format == "fp4"
    assert (native.prefill(TOKEN_IDS) - expected).abs().max() < 0.01  # inputs are rounded to 16 bits


def test_every_tensor_is_used_and_none_may_be_left_over(tmp_path: Path) -> None:
    folder = write_mxfp4(tmp_path / "packed", tmp_path / "dense")
    load_model(Settings(str(folder)))
    name = "model.layers.0.mlp.experts.down_proj_scales"
    change_tensor(folder, name, torch.zeros(4, 64, 7, dtype=torch.uint8))
    with pytest.raises(ConfigurationError, match=r"down_proj_scales' .* has shape \(4, 64, 7\); expected \(4, 64, 3\)"):
        Passes(folder)
    change_tensor(folder, name, None)
    with pytest.raises(ConfigurationError, match=r"no tensor 'model\.layers\.0\.mlp\.experts\.down_proj_scales'"):
        Passes(folder)


def test_a_share_of_an_expert_is_a_part_of_it(tmp_path: Path) -> None:
    folder = write_mxfp4(tmp_path / "packed", tmp_path / "dense")
    name, shape = "model.layers.1.mlp.experts.2.gate_proj.weight", (96, 64)
    down, down_shape = "model.layers.1.mlp.experts.2.down_proj.weight", (64, 96)
    with open_weights(folder) as packed, open_weights(tmp_path / "dense") as dense:
        assert torch.equal(packed.tensor(name, shape), dense.tensor(name, shape))
        assert torch.equal(packed.tensor(name, shape, range(48, 96)), dense.tensor(name, shape)[48:])
        part = packed.tensor(down, down_shape, None, range(32, 64))
        assert torch.equal(part, dense.tensor(down, down_shape)[:, 32:64])
        bias = "model.layers.1.mlp.experts.2.up_proj.bias"
        assert torch.equal(packed.tensor(bias, (96,), range(5, 9)), dense.tensor(bias, (96,))[5:9])
    Passes(folder, ranks=SingleRank(1, 2), placement=RankPlacement.TENSOR)


@pytest.mark.parametrize(("name", "value"), [("swiglu_limit", 5.0), ("swiglu_alpha", 1.0)])
def test_another_gate_is_refused(tmp_path: Path, name: str, value: float) -> None:
    write_checkpoint(tmp_path, "gpt_oss", **FAMILY_OPTIONS["gpt_oss"], **{name: value})
    with pytest.raises(ConfigurationError, match=f"{name} is {value}; supported:"):
        load_config(tmp_path)
