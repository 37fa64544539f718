from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import structlog
import torch

from easyspec.errors import ConfigurationError
from easyspec.model.config import load_config
from easyspec.model.layer_spec import HeadNorm, MlpSpec
from easyspec.model.plain_config import plain_json_config
from tests.fakes.checkpoints import change_config, write_checkpoint
from tests.model.passes import rotary_table

_CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 300,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "max_position_embeddings": 512,
    "dtype": "float32",
}


def write_config(folder: Path, **fields: Any) -> Path:
    (folder / "config.json").write_text(json.dumps({**_CONFIG, **fields}))
    return folder


def test_the_shape_is_read(tmp_path: Path) -> None:
    config = load_config(write_config(tmp_path, head_dim=24, tie_word_embeddings=True, rms_norm_eps=1e-3))
    assert (config.vocab_size, config.hidden_size, config.num_layers) == (300, 64, 3)
    assert (config.num_heads, config.num_kv_heads, config.head_dim) == (4, 2, 24)
    assert (config.intermediate_size, config.max_model_len, config.spec.final_norm.eps) == (96, 512, 1e-3)
    assert config.tie_word_embeddings
    assert config.dtype == torch.float32


@pytest.mark.parametrize(
    ("model_type", "fields", "qk_norm", "qkv_bias", "output_bias", "mlp_bias"),
    [
        ("llama", {}, False, False, False, False),
        ("llama", {"attention_bias": True}, False, True, True, False),
        ("llama", {"mlp_bias": True}, False, False, False, True),
        ("mistral", {"attention_bias": True, "mlp_bias": True}, False, False, False, False),
        ("qwen2", {}, False, True, False, False),
        ("qwen3", {}, True, False, False, False),
        ("qwen3", {"attention_bias": True}, True, True, True, False),
    ],
)
def test_what_a_family_adds(
    tmp_path: Path,
    model_type: str,
    fields: dict[str, Any],
    qk_norm: bool,
    qkv_bias: bool,
    output_bias: bool,
    mlp_bias: bool,
) -> None:
    config = load_config(write_config(tmp_path, model_type=model_type, **fields))
    attention, mlp = config.spec.layers[1].attention, config.spec.layers[1].mlp
    assert isinstance(mlp, MlpSpec)
    assert attention.head_norm is (HeadNorm.HEADS if qk_norm else HeadNorm.NONE)
    assert (attention.has_qkv_bias, attention.has_output_bias, mlp.has_bias) == (qkv_bias, output_bias, mlp_bias)


@pytest.mark.parametrize(
    ("in_config", "in_generation_config", "expected"),
    [
        (None, None, ()),
        (7, None, (7,)),
        ([7, 8], None, (7, 8)),
        (7, {"eos_token_id": [1, 2]}, (1, 2, 7)),
        (7, {"eos_token_id": 3}, (3, 7)),
        (7, {"temperature": 0.5}, (7,)),
        (7, {"eos_token_id": [0, 7]}, (0, 7)),
    ],
)
def test_end_tokens(tmp_path: Path, in_config: Any, in_generation_config: Any, expected: tuple[int, ...]) -> None:
    write_config(tmp_path, eos_token_id=in_config)
    if in_generation_config is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(in_generation_config))
    assert load_config(tmp_path).eos_token_ids == expected


@pytest.mark.parametrize("as_written", ["ab", {"content": "ab", "special": True}])
def test_the_tokenizers_own_end_ends_a_text_too(tmp_path: Path, as_written: Any) -> None:
    write_config(tmp_path, eos_token_id=0)
    tokenizer = {"model": {"vocab": {"<|endoftext|>": 0, "a": 1}}, "added_tokens": [{"id": 2, "content": "ab"}]}
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": as_written}))
    assert load_config(tmp_path).eos_token_ids == (0, 2)


@pytest.mark.parametrize(("eos_token_id", "is_warned"), [(None, True), (0, False)])
def test_a_model_without_an_end_is_warned_of(tmp_path: Path, eos_token_id: int | None, is_warned: bool) -> None:
    with structlog.testing.capture_logs() as logs:
        load_config(write_config(tmp_path, eos_token_id=eos_token_id))
    assert ["no_end_token" in entry["event"] for entry in logs] == [True] * is_warned


@pytest.mark.parametrize(
    ("fields", "windows"),
    [
        ({"model_type": "mistral", "sliding_window": 100}, (100,) * 3),
        ({"model_type": "mistral", "sliding_window": 4096}, (4096,) * 3),
        ({"model_type": "mistral", "sliding_window": None}, (None,) * 3),
        ({"model_type": "qwen2", "sliding_window": 64, "use_sliding_window": False}, (None,) * 3),
        (
            {"model_type": "qwen2", "sliding_window": 64, "use_sliding_window": True, "max_window_layers": 3},
            (None,) * 3,
        ),
        (
            {"model_type": "qwen3", "sliding_window": 64, "use_sliding_window": True, "max_window_layers": 1},
            (None, 64, 64),
        ),
        (
            {
                "model_type": "qwen2",
                "sliding_window": 64,
                "use_sliding_window": True,
                "layer_types": ["full_attention", "sliding_attention", "full_attention"],
            },
            (None, 64, None),
        ),
    ],
)
def test_windows_are_those_of_the_layers_and_leave_the_context(
    tmp_path: Path, fields: dict[str, Any], windows: tuple[int | None, ...]
) -> None:
    config = load_config(write_config(tmp_path, **fields))
    assert tuple(layer.attention.window for layer in config.spec.layers) == windows
    assert config.max_model_len == 512


@pytest.mark.parametrize(
    ("rope", "positions", "context"),
    [
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256}, 256, 1024),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256}, 1024, 1024),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256}, 320, 1024),
        ({"rope_type": "yarn", "factor": 2.5}, 256, 640),
        ({"rope_type": "linear", "factor": 4.0}, 256, 1024),
        ({"rope_type": "dynamic", "factor": 4.0}, 256, 256),
        (
            {
                "rope_type": "llama3",
                "factor": 32.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 256,
            },
            1024,
            1024,
        ),
    ],
)
def test_a_scaled_context_is_as_long_as_the_model_card_says(
    tmp_path: Path, rope: dict[str, Any], positions: int, context: int
) -> None:
    config = load_config(write_config(tmp_path, rope_scaling=rope, max_position_embeddings=positions))
    assert config.max_model_len == context
    assert rotary_table(config).cosines.shape == (context, 8)


def test_max_model_len_shortens_the_context(tmp_path: Path) -> None:
    write_config(tmp_path)
    for length in (1, 100, 512):
        config = load_config(tmp_path, max_model_len=length)
        assert config.max_model_len == length
        assert rotary_table(config).cosines.shape == (length, 8)


def test_max_model_len_may_go_beyond_the_checkpoint_with_a_warning(tmp_path: Path) -> None:
    write_config(tmp_path, eos_token_id=0)
    with structlog.testing.capture_logs() as logs:
        assert load_config(tmp_path, max_model_len=513).max_model_len == 513
    assert [(entry["event"], entry["made_for"]) for entry in logs] == [("context_beyond_checkpoint", 512)]


def test_max_model_len_stays_within_what_can_be_computed(tmp_path: Path) -> None:
    write_config(tmp_path, rope_scaling={"rope_type": "dynamic", "factor": 2.0})
    with pytest.raises(ConfigurationError, match=r"max_model_len is 513; allowed: up to 512, .* rope_type is dynamic"):
        load_config(tmp_path, max_model_len=513)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"dual_chunk_attention_config": {"chunk_size": 8}}, "dual_chunk_attention_config is .*; supported .* unset"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5 .*; supported for model_type 'llama': 1"),
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping is 50.0"),
        ({"embedding_multiplier": 12.0}, "embedding_multiplier is 12.0"),
        ({"num_local_experts": 8}, "num_local_experts is 8"),
        (
            {"model_type": "qwen2", "layer_types": ["full_attention", "full_attention", "linear_attention"]},
            "layer_types has .*linear_attention.*; supported: full_attention, sliding_attention",
        ),
    ],
)
def test_attention_that_is_not_understood_is_refused(tmp_path: Path, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        load_config(write_config(tmp_path, **fields))


def test_neutral_settings_of_other_models_are_let_through(tmp_path: Path) -> None:
    load_config(write_config(tmp_path, partial_rotary_factor=1.0, attn_logit_softcapping=None, embedding_multiplier=1))


@pytest.mark.parametrize(
    ("exit_layers", "expected"), [(None, ()), ([], ()), ([3], ()), ([1, 2, 3], (1, 2)), ([1, 2], (1, 2))]
)
def test_exits_are_read_and_the_last_layer_is_none(
    tmp_path: Path, exit_layers: list[int] | None, expected: tuple[int, ...]
) -> None:
    fields = {} if exit_layers is None else {"exit_layers": exit_layers}
    assert load_config(write_config(tmp_path, **fields)).early_exits == expected


@pytest.mark.parametrize("exit_layers", [[0, 2], [2, 1], [2, 2], [2, 4], ["1"], [1.0], [True], "12", 2])
def test_impossible_exits_are_refused(tmp_path: Path, exit_layers: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"exit_layers is .*; allowed: rising numbers, 1 to 3"):
        load_config(write_config(tmp_path, exit_layers=exit_layers))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_types_by_name_and_from_the_checkpoint(tmp_path: Path, dtype: str) -> None:
    write_config(tmp_path, dtype=dtype)
    assert load_config(tmp_path).dtype == getattr(torch, dtype)
    write_config(tmp_path, dtype=None)
    assert load_config(tmp_path).dtype == torch.float32
    assert load_config(tmp_path, dtype).dtype == getattr(torch, dtype)


@pytest.mark.parametrize("dtype", ["float8", "float64", "int8", "", "torch.float32"])
def test_an_unknown_type_is_refused(tmp_path: Path, dtype: str) -> None:
    write_config(tmp_path)
    with pytest.raises(ConfigurationError, match="allowed: auto, float32, bfloat16, float16") as caught:
        load_config(tmp_path, dtype)
    assert f"dtype is {dtype!r}" in str(caught.value)


@pytest.mark.parametrize("dtype", ["float64", "int8"])
def test_a_checkpoint_of_another_type_is_refused(tmp_path: Path, dtype: str) -> None:
    with pytest.raises(ConfigurationError, match=f"dtype is '{dtype}'; allowed: auto, float32"):
        load_config(write_config(tmp_path, dtype=dtype))


@pytest.mark.parametrize("model_type", ["gpt2", "mamba", "never-heard-of", 7, None])
def test_an_unsupported_model_type_lists_the_supported(tmp_path: Path, model_type: Any) -> None:
    with pytest.raises(ConfigurationError) as caught:
        load_config(write_config(tmp_path, model_type=model_type))
    message = str(caught.value)
    assert f"model_type is {model_type!r}" in message
    assert str(tmp_path) in message
    assert "supported: llama, mistral, mistral3" in message


@pytest.mark.parametrize("content", [None, b"", b"{", b"[]", b"null", b"{}", b'"llama"', b"\xff\xfe\x00"])
def test_a_missing_or_corrupt_config(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ConfigurationError, match=r"no usable config\.json in") as caught:
        load_config(tmp_path)
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("hidden_size", "many"),
        ("hidden_size", 63),
        ("num_attention_heads", 0),
        ("head_dim", 7),
        ("num_hidden_layers", None),
        ("dtype", "float7"),
        ("rope_scaling", {"rope_type": "yarn"}),
    ],
)
def test_impossible_values(tmp_path: Path, field: str, value: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"no usable config\.json in"):
        load_config(write_config(tmp_path, **{field: value}))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_size": -64}, "hidden_size is -64 in .*; allowed: at least 1"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0 in .*; allowed: at least 1"),
        ({"max_position_embeddings": 0}, "max_position_embeddings is 0 in .*; allowed: at least 1"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu' in .*; supported: silu"),
        ({"num_key_value_heads": 3}, "num_key_value_heads is 3 in .*; allowed: divisors of num_attention_heads, 4"),
        ({"per_layer_config": {"1": {"intermediate_size": 48}}}, "per_layer_config is set in .*; supported: layers of"),
        (
            {"quantization_config": {"quant_method": "quip"}},
            "quant_method is 'quip' in .*; supported: compressed-tensors, gptq, awq, fp8",
        ),
    ],
)
def test_what_this_decoder_would_get_wrong_is_refused(tmp_path: Path, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        load_config(write_config(tmp_path, **fields))


@pytest.mark.parametrize("content", ["{", "[]", "null"])
def test_a_corrupt_generation_config(tmp_path: Path, content: str) -> None:
    write_config(tmp_path)
    (tmp_path / "generation_config.json").write_text(content)
    with pytest.raises(ConfigurationError, match=r"no usable generation_config\.json in"):
        load_config(tmp_path)


@pytest.mark.parametrize(
    "scaling",
    [
        {"rope_type": "proportional", "factor": 2.0},
        {"rope_type": "spiral", "factor": 2.0},
    ],
)
def test_an_unsupported_rope_type(tmp_path: Path, scaling: dict[str, Any]) -> None:
    config = load_config(write_config(tmp_path, rope_scaling=scaling))
    with pytest.raises(
        ConfigurationError, match="supported: default, llama3, linear, dynamic, yarn, longrope"
    ) as caught:
        rotary_table(config)
    assert f"rope_type is {scaling['rope_type']!r}" in str(caught.value)


def test_a_saved_checkpoint_is_read_as_written(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "qwen3", head_dim=32, dtype=torch.bfloat16)
    config = load_config(tmp_path)
    assert (config.head_dim, config.dtype) == (32, torch.bfloat16)
    assert config.spec.layers[0].attention.head_norm is HeadNorm.HEADS
    change_config(tmp_path, head_dim=48)
    assert load_config(tmp_path).head_dim == 48


# What published checkpoints of the plainest families say: all of it, so that nothing is left to transformers' defaults.
_PUBLISHED: dict[str, Any] = {
    **_CONFIG,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "eos_token_id": 2,
    "bos_token_id": 1,
    "rope_theta": 500000.0,
    "rope_scaling": None,
    "torch_dtype": "bfloat16",
}
_WINDOWS_OFF = {"use_sliding_window": False, "sliding_window": 256, "max_window_layers": 2}


def write_published(folder: Path, **fields: Any) -> Path:
    published = {name: value for name, value in {**_PUBLISHED, **fields}.items() if value != "left out"}
    (folder / "config.json").write_text(json.dumps(published))
    return folder


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"dtype": "left out"},
        {"rope_theta": "left out", "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
        {"head_dim": 24, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
        {"eos_token_id": [2, 3], "exit_layers": [1, 3], "quantization_config": {"quant_method": "fp8"}},
        {"model_type": "qwen2", **_WINDOWS_OFF},
        {"model_type": "qwen2", "layer_types": ["full_attention"] * 3, "sliding_window": None},
        {"model_type": "qwen3", "head_dim": 32, **_WINDOWS_OFF},
        {"model_type": "qwen3"},
    ],
)
def test_the_plainest_configurations_are_read_as_transformers_reads_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fields: dict[str, Any]
) -> None:
    folder = write_published(tmp_path, **fields)
    plain = load_config(folder)
    monkeypatch.setattr("easyspec.model.config.plain_json_config", lambda fields: None)
    full = load_config(folder)
    assert isinstance(plain.hf_config, SimpleNamespace)
    assert not isinstance(full.hf_config, SimpleNamespace)
    assert replace(plain, hf_config=None) == replace(full, hf_config=None)
    assert torch.equal(rotary_table(plain).cosines, rotary_table(full).cosines)


@pytest.mark.parametrize(
    "fields",
    [
        {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
        {
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
            "rope_scaling": {"rope_type": "yarn", "factor": 4.0},
        },
        {"rope_theta": "left out"},
        {"num_key_value_heads": "left out"},
        {"eos_token_id": "left out"},
        {"hidden_act": "gelu"},
        {"hidden_size": "64"},
        {"vocab_size": 0},
        {"rms_norm_eps": "small"},
        {"torch_dtype": "half"},
        {"torch_dtype": "torch.bfloat16"},
        {"dtype": "", "torch_dtype": "bfloat16"},
        {"attention_bias": "yes"},
        {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 256},
        {"model_type": "qwen2", "use_sliding_window": None},
        {"head_dim": 7},
        {"hidden_size": 28},
        {"model_type": "qwen3", "head_dim": None},
        {"layer_types": ["attention"] * 3},
        {"layer_types": []},
        {"layer_types": [["full_attention"]] * 3},
        {"quantization_config": "fp8"},
        {"auto_map": {"AutoConfig": "configuration.Own"}},
        {"configuration_files": ["config.4.0.0.json"]},
        {"per_layer_config": {"1": {"intermediate_size": 48}}},
    ],
)
def test_what_is_not_plain_is_left_to_transformers(fields: dict[str, Any]) -> None:
    published = {name: value for name, value in {**_PUBLISHED, **fields}.items() if value != "left out"}
    assert plain_json_config(_PUBLISHED) is not None
    assert plain_json_config(published) is None


def test_a_plain_configuration_is_read_without_transformers(tmp_path: Path) -> None:
    """Which takes seconds to import and 80 MiB."""
    folder = write_published(tmp_path)
    program = (
        "import sys; from pathlib import Path; from easyspec.model.config import load_config; "
        f"load_config(Path({str(folder)!r})); print('transformers' in sys.modules)"
    )
    assert (
        subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout == "False\n"
    )
