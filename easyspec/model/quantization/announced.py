"""Which way of quantizing a config.json announces."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from easyspec.errors import ConfigurationError
from easyspec.model.quantization.compressed_tensors import CompressedTensors
from easyspec.model.quantization.fp8 import Fp8
from easyspec.model.quantization.gptq import Awq, Gptq
from easyspec.model.quantization.scheme import Quantization
from easyspec.model.supported_models import QUANTIZATION_METHODS

_CT_FORMATS = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized", "dense")


def read_quantization(folder: Path) -> Quantization | None:
    """That of a checkpoint folder; None for one that is not quantized. Raises ConfigurationError for other ways."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        announced = config.get("quantization_config") or config.get("compression_config")
    except (OSError, ValueError, AttributeError) as error:
        raise ConfigurationError(f"no usable config.json in {folder}: {error!r}") from error
    return None if announced is None else announced_quantization(announced, folder)


def announced_quantization(config: Mapping[str, Any], folder: Path) -> Quantization | None:
    """The way that `quantization_config` describes; raises ConfigurationError naming what is not supported.

    None for MXFP4, which only experts have: easyspec/model/fused_experts.py reads them.
    """
    method = config.get("quant_method") or ("compressed-tensors" if "config_groups" in config else None)
    if method == "mxfp4":
        return None
    if method == "gptq":
        _check(folder, "bits", config.get("bits"), (4, 8))
        less_one = config.get("checkpoint_format", "gptq") != "gptq_v2"
        return Gptq(int(config["bits"]), less_one)
    if method == "awq":
        _check(folder, "bits", config.get("bits", config.get("w_bit")), (4,))
        _check(folder, "version", str(config.get("version", "gemm")).lower(), ("gemm",))
        _check(folder, "zero_point", config.get("zero_point", True), (True,))
        return Awq()
    if method == "fp8":
        shape = config.get("weight_block_size")
        return Fp8(None if shape is None else (int(shape[0]), int(shape[1])))
    if method == "compressed-tensors":
        return _compressed_tensors(config, folder)
    raise ConfigurationError(
        f"quantization_config's quant_method is {method!r} in {folder}; supported: {', '.join(QUANTIZATION_METHODS)}, "
        "GGUF files, and unquantized checkpoints"
    )


def _compressed_tensors(config: Mapping[str, Any], folder: Path) -> Quantization:
    sparsity = (config.get("sparsity_config") or {}).get("format", "dense")
    _check(folder, "sparsity_config.format", sparsity, ("dense",))
    groups = (config.get("config_groups") or {}).values()
    weights = [group["weights"] for group in groups if group.get("weights")]
    for format_ in (config.get("format", "dense"), *(group.get("format") for group in groups)):
        _check(folder, "format", format_ or "dense", _CT_FORMATS)
    num_bits = {int(each["num_bits"]) for each in weights if each.get("type", "int") == "int"}
    if len(num_bits) > 1:
        raise ConfigurationError(f"config_groups of {folder} have weights of {sorted(num_bits)} bits; supported: one")
    for each in num_bits:
        _check(folder, "num_bits", each, (4, 8))
    shapes = [each["block_structure"] for each in weights if each.get("block_structure")]
    block_shape = (int(shapes[0][0]), int(shapes[0][1])) if shapes else None
    return CompressedTensors(num_bits.pop() if num_bits else 8, block_shape)


def _check(folder: Path, name: str, value: object, allowed: tuple[object, ...]) -> None:
    if value not in allowed:
        raise ConfigurationError(
            f"quantization_config's {name} is {value!r} in {folder}; supported: {', '.join(map(str, allowed))}"
        )
