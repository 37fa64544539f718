"""Quantized safetensors stand for what their formats' rules, or libraries, say."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from easyspec.errors import ConfigurationError
from easyspec.model.config import load_config
from easyspec.model.loading import load_model
from easyspec.model.quantization.mxfp4 import mxfp4_values
from easyspec.model.weight_source import open_weights
from tests.fakes.checkpoints import change_tensor, reference_model, write_checkpoint
from tests.fakes.families import FAMILY_OPTIONS
from tests.fakes.quantized import GROUP, Quantize, awq, compressed, fp8_blocks, fp8_tensor, gptq, quantize_checkpoint
from tests.fakes.tiny_tokenizer import write_tokenizer
from tests.model.passes import Passes
from tests.model.test_loading import Settings

TOKENS = [5, 8, 13, 21, 34, 55, 89]
GPTQ = {"quant_method": "gptq", "group_size": GROUP, "sym": False, "desc_act": False}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"}


def compressed_config(format_: str, **weights: Any) -> tuple[dict[str, Any], Quantize]:
    from compressed_tensors.quantization import QuantizationArgs

    args = QuantizationArgs(**weights)
    group = {"targets": ["Linear"], "weights": json.loads(args.model_dump_json())}
    config = {"quant_method": "compressed-tensors", "format": format_, "config_groups": {"group_0": group}}
    return config, compressed(format_, args)


CASES: dict[str, tuple[dict[str, Any], Quantize]] = {
    "gptq 4 bit": (GPTQ | {"bits": 4}, gptq(4)),
    "gptq 8 bit": (GPTQ | {"bits": 8}, gptq(8)),
    "gptq act-order": (GPTQ | {"bits": 4, "desc_act": True}, gptq(4, is_act_order=True)),
    "gptq_v2": (GPTQ | {"bits": 4, "checkpoint_format": "gptq_v2"}, gptq(4, is_v2=True)),
    "awq": (AWQ, awq),
    "fp8 in blocks": ({"quant_method": "fp8", "weight_block_size": [48, 40]}, lambda tensor: _fp8(tensor)),
    "fp8 a tensor": ({"quant_method": "fp8", "activation_scheme": "static"}, fp8_tensor),
    "int4 in groups": compressed_config(
        "pack-quantized", num_bits=4, strategy="group", group_size=GROUP, symmetric=True
    ),
    "int4 in groups with zeros": compressed_config(
        "pack-quantized", num_bits=4, strategy="group", group_size=GROUP, symmetric=False
    ),
    "int4 a row": compressed_config("pack-quantized", num_bits=4, strategy="channel", symmetric=True),
    "int8 packed": compressed_config("pack-quantized", num_bits=8, strategy="channel", symmetric=True),
    "int8 a row": compressed_config("int-quantized", num_bits=8, strategy="channel", symmetric=True),
    "int8 a tensor": compressed_config("int-quantized", num_bits=8, strategy="tensor", symmetric=True),
    "FP8 a row": compressed_config("float-quantized", num_bits=8, type="float", strategy="channel", symmetric=True),
    "FP8 a tensor": compressed_config("float-quantized", num_bits=8, type="float", strategy="tensor", symmetric=True),
    "FP8 in blocks": compressed_config(
        "float-quantized", num_bits=8, type="float", strategy="block", block_structure=[32, 32], symmetric=True
    ),
}


def _fp8(tensor: torch.Tensor) -> tuple[Any, torch.Tensor]:
    """Blocks that are not square, so that the last of a row and of a column are cut short."""
    return fp8_blocks(48, 40)(tensor)


def written(folder: Path, case: str, **options: Any) -> tuple[Path, Path]:
    """A quantized checkpoint and the one that it stands for."""
    config, quantize = CASES[case]
    checkpoint, reference = write_checkpoint(folder / "quantized", **options), folder / "reference"
    quantize_checkpoint(checkpoint, reference, config, quantize)
    return checkpoint, reference


@pytest.mark.parametrize("case", CASES)
def test_weights_are_what_the_format_says(tmp_path: Path, case: str) -> None:
    checkpoint, reference = written(tmp_path, case)
    expected = load_file(reference / "model.safetensors")
    with open_weights(checkpoint, is_whole=True) as source:  # all tensors of the format are used
        for name, tensor in expected.items():
            shape = tuple(tensor.shape)
            assert torch.allclose(source.tensor(name, shape), tensor, rtol=1e-6, atol=1e-7), name
            if tensor.dim() == 2:
                assert torch.equal(source.tensor(name, shape, range(3, 20)), source.tensor(name, shape)[3:20])
                columns = source.tensor(name, shape, None, range(5, 30))
                assert torch.equal(columns, source.tensor(name, shape)[:, 5:30])


@pytest.mark.parametrize("case", [case for case in CASES if "fp8" not in case.lower()])
def test_codes_scales_and_zeros_are_handed_on(tmp_path: Path, case: str) -> None:
    checkpoint, reference = written(tmp_path, case)
    expected = load_file(reference / "model.safetensors")
    with open_weights(checkpoint) as source:
        for name, tensor in expected.items():
            packed = source.blocks(name, tuple(tensor.shape))
            if "_proj.weight" not in name:
                assert packed is None
                continue
            assert packed is not None
            assert packed.format == ("uint8" if "8" in case else "uint4")
            assert packed.shape == tuple(tensor.shape)
            codes, scales, zeros = (torch.from_numpy(packed.parts[part]) for part in ("codes", "scales", "zeros"))
            groups = torch.arange(codes.shape[1]) // (codes.shape[1] // scales.shape[1])
            if case == "gptq act-order":
                groups = torch.from_numpy(packed.parts["group_of_column"])
            else:
                assert "group_of_column" not in packed.parts
            values = (codes.float() - zeros[:, groups]) * scales[:, groups]
            assert torch.allclose(values, tensor, rtol=1e-6, atol=1e-7), name
            some = source.blocks(name, tuple(tensor.shape), range(2, 9))
            assert some is not None
            assert torch.equal(torch.from_numpy(some.parts["codes"]), codes[2:9])


@pytest.mark.parametrize("case", ["gptq act-order", "awq", "fp8 in blocks", "int4 in groups with zeros", "FP8 a row"])
def test_logits_are_those_of_what_it_stands_for(tmp_path: Path, case: str) -> None:
    checkpoint, reference = written(tmp_path, case, model_type="qwen2")
    with torch.inference_mode():
        expected = reference_model(reference)(torch.tensor([TOKENS])).logits[0]
    assert torch.allclose(Passes(checkpoint, executor="reference").prefill(TOKENS), expected, atol=2e-4)


@pytest.mark.parametrize("model_type", sorted(FAMILY_OPTIONS.keys() - {"gpt_oss"}))
def test_every_family_is_read_quantized(tmp_path: Path, model_type: str) -> None:
    checkpoint, reference = written(tmp_path, "int8 a row", model_type=model_type, **FAMILY_OPTIONS[model_type])
    with torch.inference_mode():
        expected = reference_model(reference)(torch.tensor([TOKENS])).logits[0]
    assert torch.allclose(Passes(checkpoint, executor="reference").prefill(TOKENS), expected, atol=2e-4)


def test_a_quantized_model_is_loaded(tmp_path: Path) -> None:
    checkpoint, _ = written(tmp_path, "fp8 a tensor")  # with scales of activations, which are not rounded here
    loaded = load_model(Settings(str(write_tokenizer(checkpoint))))
    assert loaded.info.num_layers == 3


def test_parts_that_do_not_fit_name_the_layer(tmp_path: Path) -> None:
    checkpoint, _ = written(tmp_path, "fp8 in blocks")
    scale = "model.layers.0.self_attn.q_proj.weight_scale_inv"
    change_tensor(checkpoint, scale, torch.ones(7, 7))
    with open_weights(checkpoint) as source, pytest.raises(ConfigurationError, match=r"q_proj\.weight.* blocks of"):
        source.tensor("model.layers.0.self_attn.q_proj.weight", (64, 64))
    change_tensor(checkpoint, scale, None)
    with open_weights(checkpoint) as source, pytest.raises(ConfigurationError, match="is stored as F8_E4M3"):
        source.tensor("model.layers.0.self_attn.q_proj.weight", (64, 64))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"quant_method": "bitsandbytes"}, "quant_method is 'bitsandbytes' in .*; supported: compressed-tensors, gptq"),
        (GPTQ | {"bits": 3}, "bits is 3 in .*; supported: 4, 8"),
        (AWQ | {"version": "gemv"}, "version is 'gemv'"),
        ({"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized"}, "format is 'nvfp4-pack-quantized'"),
        (
            {"quant_method": "compressed-tensors", "sparsity_config": {"format": "sparse-24-bitmask"}},
            r"sparsity_config\.format is 'sparse-24-bitmask'",
        ),
    ],
)
def test_other_ways_are_refused_by_name(tmp_path: Path, config: dict[str, Any], message: str) -> None:
    checkpoint = write_checkpoint(tmp_path)
    content = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps(content | {"quantization_config": config}))
    with pytest.raises(ConfigurationError, match=message):
        load_config(checkpoint)
    shutil.rmtree(checkpoint)


def test_mxfp4_is_gpt_oss() -> None:
    generator = torch.Generator().manual_seed(0)
    blocks = torch.randint(0, 256, (2, 6, 3, 16), generator=generator, dtype=torch.uint8)
    scales = torch.randint(110, 140, (2, 6, 3), generator=generator, dtype=torch.uint8)
    theirs = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)  # rows and columns exchanged
    assert torch.equal(mxfp4_values(blocks, scales), theirs.transpose(1, 2))
