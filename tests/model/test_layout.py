"""What a checkpoint's headers tell about it, without its values: for each family and way of storing weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from easyspec.errors import ConfigurationError
from easyspec.model.layout import check_layout
from tests.fakes.checkpoints import change_config, change_tensor, write_checkpoint
from tests.fakes.families import FAMILY_OPTIONS
from tests.model.test_fused_experts import write_mxfp4
from tests.model.test_quantization import CASES, written


@pytest.mark.parametrize("model_type", FAMILY_OPTIONS)
def test_every_tensor_of_every_family_counts(tmp_path: Path, model_type: str) -> None:
    folder = write_checkpoint(tmp_path, model_type, **FAMILY_OPTIONS[model_type])
    check_layout(folder)
    last = max(name for name in load_file(folder / "model.safetensors") if ".layers.2." in name)
    change_tensor(folder, last, None)
    with pytest.raises(ConfigurationError, match="no tensor"):
        check_layout(folder)


@pytest.mark.parametrize("case", CASES)
def test_quantized_layers_are_whole(tmp_path: Path, case: str) -> None:
    check_layout(written(tmp_path, case)[0])


def test_fused_experts_in_mxfp4_are_whole(tmp_path: Path) -> None:
    check_layout(write_mxfp4(tmp_path / "packed", tmp_path / "dense"))


def test_values_are_not_read(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path)
    change_tensor(folder, "model.norm.weight", torch.full((64,), torch.nan))
    check_layout(folder)


def test_a_shape_that_the_config_does_not_give_is_named(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path)
    change_config(folder, intermediate_size=48)
    with pytest.raises(ConfigurationError, match=r"mlp\.\w+_proj\.weight'.* has shape .*; expected"):
        check_layout(folder)


def test_a_tensor_of_another_model_is_named(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path)
    change_tensor(folder, "model.layers.0.self_attn.rotor.weight", torch.zeros(3))
    with pytest.raises(ConfigurationError, match=r"rotor.* is not used"):
        check_layout(folder)
