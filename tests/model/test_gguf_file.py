"""GGUF files stand for the same model as the folder they were made of, in every type that is read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf.constants import GGMLQuantizationType
from safetensors.torch import load_file

from easyspec.errors import ConfigurationError
from easyspec.model.config import load_config
from easyspec.model.fingerprint import model_fingerprint
from easyspec.model.gguf_blocks import FLOAT_TYPES
from easyspec.model.gguf_file import GgufCheckpoint
from easyspec.model.loading import load_model
from easyspec.model.supported_models import BLOCK_FORMATS
from tests.fakes.checkpoints import change_config, reference_model, write_checkpoint
from tests.fakes.gguf_files import gguf_name, write_gguf
from tests.model.passes import Passes, rotary_table
from tests.model.test_loading import Settings

# Blocks of the larger kind have 256 values.
WIDE = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2}
TOKENS = [5, 8, 13, 21, 34, 55, 89]


def written(folder: Path, kind: str = "F32", model_type: str = "llama", **options: Any) -> Path:
    """A GGUF file and beside it, in `folder`, the checkpoint that it stands for."""
    write_checkpoint(folder, model_type, **options)
    return write_gguf(folder, folder / f"tiny-{kind}.gguf", kind)


@pytest.mark.parametrize("kind", [*FLOAT_TYPES, *BLOCK_FORMATS])
def test_tensors_have_the_names_values_and_rows_of_the_checkpoint(tmp_path: Path, kind: str) -> None:
    path = written(tmp_path, kind, **WIDE)
    expected = load_file(tmp_path / "model.safetensors")
    with GgufCheckpoint(path) as checkpoint:
        assert set(checkpoint) == set(expected)
        for name, tensor in expected.items():
            shape = tuple(tensor.shape)
            assert torch.equal(checkpoint.tensor(name, shape).float(), tensor), name
            assert torch.equal(checkpoint.tensor(name, shape, range(3, 40)).float(), tensor[3:40]), name
            if tensor.dim() == 2:
                assert torch.equal(checkpoint.tensor(name, shape, None, range(7, 50)).float(), tensor[:, 7:50]), name


@pytest.mark.parametrize("kind", BLOCK_FORMATS)
def test_blocks_come_as_they_are_stored(tmp_path: Path, kind: str) -> None:
    path = written(tmp_path, kind, **WIDE)
    stored = {tensor.name: np.asarray(tensor.data) for tensor in gguf.GGUFReader(path).tensors}
    with GgufCheckpoint(path) as checkpoint:
        for name, tensor in load_file(tmp_path / "model.safetensors").items():
            shape = tuple(tensor.shape)
            packed = checkpoint.blocks(name, shape)
            if tensor.dim() == 1:
                assert packed is None
                continue
            assert packed is not None
            assert (packed.format, packed.shape) == (kind, shape)
            values = gguf.quants.dequantize(packed.parts["blocks"], GGMLQuantizationType[kind])
            assert torch.equal(torch.from_numpy(values), tensor), name
            some = checkpoint.blocks(name, shape, range(4, 9))
            assert some is not None
            assert np.array_equal(some.parts["blocks"], packed.parts["blocks"][4:9])
            if "_proj" not in name or "v_proj" in name:  # in the file's order: nothing is copied
                assert np.array_equal(packed.parts["blocks"], stored[gguf_name(name)])
                assert not packed.parts["blocks"].flags.owndata
                assert not packed.parts["blocks"].flags.writeable


@pytest.mark.parametrize(
    ("model_type", "options"),
    [
        ("llama", {}),
        ("llama", {"tie_word_embeddings": True, "num_key_value_heads": 4}),
        ("llama", {"attention_bias": True, "mlp_bias": True}),
        ("qwen2", {}),
        ("qwen3", {"head_dim": 32}),
    ],
)
@pytest.mark.parametrize("kind", ["F32", "Q4_1"])
def test_logits_are_those_of_the_checkpoint(
    tmp_path: Path, model_type: str, options: dict[str, Any], kind: str
) -> None:
    path = written(tmp_path, kind, model_type, **options)
    with torch.inference_mode():
        expected = reference_model(tmp_path)(torch.tensor([TOKENS])).logits[0]
    assert torch.allclose(Passes(path, executor="reference").prefill(TOKENS), expected, atol=2e-4)


def test_the_configuration_is_that_of_the_checkpoint(tmp_path: Path) -> None:
    path = written(tmp_path, "Q8_0", "qwen3", head_dim=32, has_tokenizer=True, eos_token_id=0)
    ours, theirs = load_config(path), load_config(tmp_path)
    fields = vars(theirs).keys() - {"hf_config", "spec"}
    assert {name: getattr(ours, name) for name in fields} == {name: getattr(theirs, name) for name in fields}
    assert ours.spec.final_norm.eps == pytest.approx(theirs.spec.final_norm.eps)
    assert [layer.attention for layer in ours.spec.layers] == [layer.attention for layer in theirs.spec.layers]
    assert [layer.mlp for layer in ours.spec.layers] == [layer.mlp for layer in theirs.spec.layers]
    assert torch.equal(*(rotary_table(config).cosines for config in (ours, theirs)))


@pytest.mark.parametrize(("kind", "dtype"), [("BF16", torch.bfloat16), ("F16", torch.float16), ("Q5_0", torch.float32)])
def test_the_type_is_the_files(tmp_path: Path, kind: str, dtype: torch.dtype) -> None:
    assert load_config(written(tmp_path, kind)).dtype == dtype


def test_frequency_factors_are_llama_3s_scaling(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, max_position_embeddings=4096, head_dim=16)
    scaling = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 256}
    change_config(tmp_path, rope_parameters={"rope_type": "llama3", "rope_theta": 10_000.0, **scaling})
    expected = rotary_table(load_config(tmp_path))
    plain = 10_000.0 ** (-torch.arange(0, 16, 2) / 16)
    factors = (plain / torch.atan2(expected.sines[1], expected.cosines[1])).numpy()
    assert factors.max() == pytest.approx(8.0, rel=1e-3)
    path = write_gguf(tmp_path, tmp_path / "scaled.gguf", tensors={"rope_freqs.weight": factors})
    table = rotary_table(load_config(path))
    assert torch.allclose(table.sines[:600], expected.sines[:600], atol=1e-3)
    with GgufCheckpoint(path, is_whole=True) as checkpoint:  # it was read with the configuration
        for name, tensor in load_file(tmp_path / "model.safetensors").items():
            checkpoint.tensor(name, tuple(tensor.shape))


def test_scaled_positions_are_read(tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    scaling = {
        "{arch}.rope.scaling.type": "yarn",
        "{arch}.rope.scaling.factor": 4.0,
        "{arch}.rope.scaling.original_context_length": 512,
    }
    config = load_config(write_gguf(tmp_path, tmp_path / "yarn.gguf", metadata=scaling))
    assert config.max_model_len == 2048
    assert rotary_table(config).cosines.shape == (2048, 8)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"general.architecture": "mamba"}, r"general.architecture is 'mamba' in .*; supported: llama, qwen2, qwen3"),
        ({"{arch}.expert_count": 8}, "no usable metadata in .*num_experts_per_tok"),
        ({"{arch}.rope.dimension_count": 8}, "partial_rotary_factor is 0.5"),
        ({"{arch}.attention.value_length": 8}, "heads of different sizes"),
        ({"{arch}.embedding_scale": 12.0}, "embedding_multiplier is 12.0"),
        ({"{arch}.attention.head_count": 3}, "no usable metadata|num_key_value_heads is 2"),
        ({"{arch}.block_count": [3, 3]}, r"llama.block_count is \[3, 3\]"),
        ({"split.count": 3}, "one of 3 parts of a model; join them"),
    ],
)
def test_what_is_not_computed_is_refused(tmp_path: Path, metadata: dict[str, Any], message: str) -> None:
    write_checkpoint(tmp_path)
    path = write_gguf(tmp_path, tmp_path / "odd.gguf", metadata=metadata)
    with pytest.raises(ConfigurationError, match=message):
        load_config(path)


def test_other_types_are_refused_by_name(tmp_path: Path) -> None:
    path = written(tmp_path, "Q2_K", **WIDE)
    with pytest.raises(ConfigurationError, match=r"is stored as Q2_K; supported: F32, F16, BF16, Q8_0, Q4_0"):
        GgufCheckpoint(path)


@pytest.mark.parametrize("num_bytes", [0, 3, 100, 5_000, 100_000])
def test_a_file_that_ends_early(tmp_path: Path, num_bytes: int) -> None:
    path = written(tmp_path, has_tokenizer=True)
    path.write_bytes(path.read_bytes()[:num_bytes])
    with pytest.raises(ConfigurationError, match=f"cannot read {path}"):
        GgufCheckpoint(path)


def test_a_file_of_something_else(tmp_path: Path) -> None:
    path = tmp_path / "page.gguf"
    path.write_bytes(b"<html>not found</html>" * 100)
    with pytest.raises(ConfigurationError, match="it is not a GGUF file, or damaged"):
        load_config(path)


def test_a_tensor_that_nothing_uses(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, has_tokenizer=True)
    gate = np.ones((4, 64), np.float32)
    path = write_gguf(tmp_path, tmp_path / "gated.gguf", tensors={"blk.0.attn_gate.weight": gate})
    with pytest.raises(ConfigurationError, match=r"'blk\.0\.attn_gate\.weight' in .* not used"):
        load_model(Settings(str(path)))


def test_missing_tensors_wrong_shapes_and_nan(tmp_path: Path) -> None:
    path = written(tmp_path)
    checkpoint = GgufCheckpoint(path)
    with pytest.raises(ConfigurationError, match=r"no tensor 'model\.layers\.9\.mlp\.up_proj\.weight'"):
        checkpoint.tensor("model.layers.9.mlp.up_proj.weight", (96, 64))
    with pytest.raises(ConfigurationError, match=r"'blk\.0\.ffn_up\.weight' in .* has shape \(96, 64\); expected"):
        checkpoint.tensor("model.layers.0.mlp.up_proj.weight", (64, 96))
    content = bytearray(path.read_bytes())
    content[-4:] = np.float32("nan").tobytes()
    path.write_bytes(content)
    last = list(gguf.GGUFReader(path).tensors)[-1]
    checkpoint = GgufCheckpoint(path)
    (name,) = (name for name in checkpoint if gguf_name(name) == last.name)
    with pytest.raises(ConfigurationError, match="values that are not numbers"):
        checkpoint.tensor(name, tuple(reversed([int(n) for n in last.shape])))


def test_the_fingerprint_follows_the_file_and_the_type(tmp_path: Path) -> None:
    path = written(tmp_path / "a", "Q8_0")
    other = written(tmp_path / "b", "Q8_0", seed=1)

    def fingerprint(path: Path, dtype: str = "auto") -> str:
        return model_fingerprint(path, load_config(path, dtype))

    assert fingerprint(path) == fingerprint(path)
    assert len({fingerprint(path), fingerprint(other), fingerprint(path, "bfloat16")}) == 3
