"""Damaged checkpoints end in a start-up error that names the file or tensor at fault."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from easyspec.errors import ConfigurationError
from easyspec.model.config import load_config
from easyspec.model.decoder import Decoder
from easyspec.model.weights import Checkpoint
from easyspec.ops.reference import ReferenceExecutor
from tests.fakes.checkpoints import change_config, change_tensor, write_checkpoint

INDEX = "model.safetensors.index.json"


def load(folder: Path) -> Decoder:
    return Decoder(folder, load_config(folder), ReferenceExecutor(torch.device("cpu")))


def refused(folder: Path) -> str:
    with pytest.raises(ConfigurationError) as caught:
        load(folder)
    return str(caught.value)


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    write_checkpoint(tmp_path, max_shard_size="60KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    return tmp_path


def test_shards_hold_the_tensors_of_one_file(tmp_path: Path) -> None:
    whole = write_checkpoint(tmp_path / "whole")
    shards = write_checkpoint(tmp_path / "shards", max_shard_size="60KB")
    expected = load_file(whole / "model.safetensors")
    with Checkpoint(shards) as checkpoint:
        assert set(checkpoint) == set(expected)
        for name, tensor in expected.items():
            assert torch.equal(checkpoint.tensor(name, tuple(tensor.shape)), tensor)


def test_a_folder_without_weights(tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    assert refused(tmp_path) == f"missing checkpoint file {tmp_path / 'model.safetensors'}"


def test_a_missing_shard(sharded: Path) -> None:
    victim = sorted(sharded.glob("model-*.safetensors"))[1]
    victim.unlink()
    assert refused(sharded) == f"missing checkpoint file {victim}"


@pytest.mark.parametrize("content", ["{", "[]", "null", "{}", '{"weight_map": []}', '{"weight_map": {"a": []}}'])
def test_a_corrupt_index(sharded: Path, content: str) -> None:
    (sharded / INDEX).write_text(content)
    assert refused(sharded).startswith(f"corrupt {sharded / INDEX}: ")


def test_a_tensor_missing_from_every_shard(sharded: Path) -> None:
    index = json.loads((sharded / INDEX).read_text())
    dropped = index["weight_map"]["model.embed_tokens.weight"]
    index["weight_map"] = {name: file for name, file in index["weight_map"].items() if file != dropped}
    (sharded / INDEX).write_text(json.dumps(index))
    message = refused(sharded)
    assert message.startswith("no tensor '")
    assert str(sharded) in message


@pytest.mark.parametrize("num_bytes", [0, 4, 100, 50_000])
def test_a_truncated_file(tmp_path: Path, num_bytes: int) -> None:
    path = write_checkpoint(tmp_path) / "model.safetensors"
    content = path.read_bytes()
    assert num_bytes < len(content)
    path.write_bytes(content[:num_bytes])
    assert refused(tmp_path).startswith(f"cannot read {path}: ")


def test_a_file_that_is_no_safetensors(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path) / "model.safetensors"
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\n" * 3)
    assert refused(tmp_path).startswith(f"cannot read {path}: ")


_TENSORS: list[tuple[str, dict[str, Any]]] = [
    ("model.embed_tokens.weight", {}),
    ("lm_head.weight", {}),
    ("model.norm.weight", {}),
    ("model.layers.2.input_layernorm.weight", {}),
    ("model.layers.1.post_attention_layernorm.weight", {}),
    ("model.layers.0.self_attn.q_proj.weight", {}),
    ("model.layers.0.self_attn.k_proj.weight", {}),
    ("model.layers.0.self_attn.o_proj.weight", {}),
    ("model.layers.1.mlp.gate_proj.weight", {}),
    ("model.layers.2.mlp.down_proj.weight", {}),
    ("model.layers.1.self_attn.v_proj.bias", {"model_type": "qwen2"}),
    ("model.layers.1.self_attn.q_norm.weight", {"model_type": "qwen3"}),
    ("model.layers.1.self_attn.o_proj.bias", {"attention_bias": True}),
    ("model.layers.1.mlp.up_proj.bias", {"mlp_bias": True}),
]


@pytest.mark.parametrize(("name", "options"), _TENSORS)
def test_a_missing_tensor_and_a_wrong_shape(tmp_path: Path, name: str, options: dict[str, Any]) -> None:
    write_checkpoint(tmp_path, **options)
    shape = tuple(load_file(tmp_path / "model.safetensors")[name].shape)
    wrong = (shape[0] + 2, *shape[1:])
    change_tensor(tmp_path, name, torch.zeros(wrong))
    assert refused(tmp_path) == f"{name!r} in {tmp_path} has shape {wrong}; expected {shape}"
    change_tensor(tmp_path, name, None)
    assert refused(tmp_path) == f"no tensor {name!r} in {tmp_path}"


def test_a_config_of_another_shape(tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    change_config(tmp_path, vocab_size=341)
    assert refused(tmp_path) == f"'model.embed_tokens.weight' in {tmp_path} has shape (340, 64); expected (341, 64)"
    change_config(tmp_path, vocab_size=340, num_hidden_layers=4)
    assert "no tensor 'model.layers.3." in refused(tmp_path)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8, torch.uint8])
def test_weights_of_a_type_that_stands_for_something_else(tmp_path: Path, dtype: torch.dtype) -> None:
    write_checkpoint(tmp_path)
    name = "model.layers.1.self_attn.q_proj.weight"
    change_tensor(tmp_path, name, load_file(tmp_path / "model.safetensors")[name].to(dtype))
    message = refused(tmp_path)
    stored = {"float8_e4m3fn": "F8_E4M3", "int8": "I8", "uint8": "U8"}[str(dtype).removeprefix("torch.")]
    assert f"{name!r} in {tmp_path / 'model.safetensors'} is stored as {stored}" in message
    assert "quantization_config" in message


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_value_that_is_no_number(tmp_path: Path, value: float, dtype: torch.dtype) -> None:
    write_checkpoint(tmp_path, dtype=dtype)
    name = "model.layers.2.mlp.down_proj.weight"
    weight = load_file(tmp_path / "model.safetensors")[name]
    weight[3, 5] = value
    change_tensor(tmp_path, name, weight)
    assert f"{name!r} in {tmp_path / 'model.safetensors'} has values that are not numbers" in refused(tmp_path)


def test_pickled_weights_alone_name_the_way_out(tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    message = refused(tmp_path)
    assert message.startswith(f"missing checkpoint file {tmp_path / 'model.safetensors'}; pytorch_model.bin holds")
    assert "save_pretrained" in message


def test_an_index_left_from_other_weights(tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}))
    assert "is left from other weights than model.safetensors: remove it" in refused(tmp_path)
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"model.gone.weight": "model.safetensors"}}))
    assert f"holds 'lm_head.weight', which it does not list by {INDEX}" in refused(tmp_path)


def test_an_index_that_promises_a_tensor_elsewhere(sharded: Path) -> None:
    index = json.loads((sharded / INDEX).read_text())
    name = "model.embed_tokens.weight"
    index["weight_map"][name] = next(file for file in index["weight_map"].values() if file != index["weight_map"][name])
    (sharded / INDEX).write_text(json.dumps(index))
    assert f"lacks {name!r}" in refused(sharded) or f"holds {name!r}" in refused(sharded)


def read_all(folder: Path, left_out: str = "") -> None:
    with Checkpoint(folder, is_whole=True) as checkpoint:
        for name, tensor in load_file(folder / "model.safetensors").items():
            if name != left_out:
                checkpoint.tensor(name, tuple(tensor.shape))


def test_a_tensor_that_nothing_uses_is_another_models(tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    read_all(tmp_path)
    name = "model.layers.0.self_attn.q_proj.weight"
    with pytest.raises(ConfigurationError, match=f"{name}' in .* is not used by the model .* another model"):
        read_all(tmp_path, left_out=name)


def test_scales_without_a_config_say_that_the_weights_are_quantized(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path) / "model.safetensors"
    scale = "model.layers.0.self_attn.q_proj.weight_scale"
    save_file({**load_file(path), scale: torch.ones(1)}, path, metadata={"format": "pt"})
    with pytest.raises(ConfigurationError, match=f"{scale}' in .* quantized in a way that config.json does not"):
        read_all(tmp_path, left_out=scale)


def test_needless_tables_and_a_tied_head_may_lie_there(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path) / "model.safetensors"
    table = "model.layers.0.self_attn.rotary_emb.inv_freq"
    save_file({**load_file(path), table: torch.ones(4)}, path, metadata={"format": "pt"})
    read_all(tmp_path, left_out=table)
    read_all(tmp_path, left_out="lm_head.weight")
