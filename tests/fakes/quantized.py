"""Quantized checkpoints of small models, by the formats' own libraries where they install, else by their rules.

Each writer takes a checkpoint's matrices apart and leaves behind, in a second folder, the checkpoint that the result
stands for.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

# A matrix [R, C] -> what is stored for it, by suffixes that take the place of "weight", and what that stands for.
Quantize = Callable[[torch.Tensor], tuple[Mapping[str, torch.Tensor], torch.Tensor]]

GROUP = 32


def quantize_checkpoint(folder: Path, reference: Path, config: Mapping[str, Any], quantize: Quantize) -> None:
    """Quantize the projections of the checkpoint in `folder`; `reference` becomes what it stands for."""
    shutil.copytree(folder, reference)
    stored, values = {}, {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        if "_proj.weight" in name:
            parts, values[name] = quantize(tensor)
            stored |= {name.removesuffix("weight") + suffix: part.contiguous() for suffix, part in parts.items()}
        else:
            stored[name] = values[name] = tensor
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    save_file({name: value.contiguous() for name, value in values.items()}, reference / "model.safetensors")
    written = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**written, "quantization_config": dict(config)}))


def packed_words(fields: torch.Tensor, num_bits: int) -> torch.Tensor:
    """Numbers [R, C] in int32 words along the columns, lowest bits first."""
    per_word = 32 // num_bits
    shifts = torch.arange(per_word) * num_bits
    words = (fields.long().view(len(fields), -1, per_word) << shifts).sum(dim=-1)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def grouped(tensor: torch.Tensor, num_bits: int, groups: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Codes [R, C], scales (float16's) and zeros [R, G] of groups of columns, and the values they stand for."""
    num_groups, most = int(groups.max()) + 1, 2**num_bits - 1
    low = torch.stack([tensor[:, groups == g].amin(dim=1).clamp(max=0) for g in range(num_groups)], dim=1)
    high = torch.stack([tensor[:, groups == g].amax(dim=1).clamp(min=0) for g in range(num_groups)], dim=1)
    scales = ((high - low) / most).half().float()
    zeros = (-low / scales).round().clamp(1, most)
    codes = (tensor / scales[:, groups] + zeros[:, groups]).round().clamp(0, most)
    return codes, scales, zeros, (codes - zeros[:, groups]) * scales[:, groups]


def gptq(num_bits: int, *, is_act_order: bool = False, is_v2: bool = False) -> Quantize:
    def quantize(tensor: torch.Tensor) -> tuple[Mapping[str, torch.Tensor], torch.Tensor]:
        groups = torch.arange(tensor.shape[1]) // GROUP
        if is_act_order:
            groups = groups[torch.randperm(len(groups), generator=torch.Generator().manual_seed(0))]
        codes, scales, zeros, values = grouped(tensor, num_bits, groups)
        return {
            "qweight": packed_words(codes, num_bits).T,
            "qzeros": packed_words((zeros - (0 if is_v2 else 1)).T, num_bits),
            "scales": scales.T.half(),
            "g_idx": groups.int(),
        }, values

    return quantize


def awq(tensor: torch.Tensor) -> tuple[Mapping[str, torch.Tensor], torch.Tensor]:
    codes, scales, zeros, values = grouped(tensor, 4, torch.arange(tensor.shape[1]) // GROUP)
    order = torch.tensor([0, 2, 4, 6, 1, 3, 5, 7])

    def packed(fields: torch.Tensor) -> torch.Tensor:
        return packed_words(fields.view(len(fields), -1, 8)[:, :, order].flatten(1), 4)

    return {"qweight": packed(codes.T), "qzeros": packed(zeros.T), "scales": scales.T.half()}, values


def fp8_blocks(height: int, width: int) -> Quantize:
    def quantize(tensor: torch.Tensor) -> tuple[Mapping[str, torch.Tensor], torch.Tensor]:
        rows, columns = torch.arange(tensor.shape[0]) // height, torch.arange(tensor.shape[1]) // width
        most = torch.zeros(int(rows[-1]) + 1, int(columns[-1]) + 1)
        for row in range(len(most)):
            for column in range(most.shape[1]):
                most[row, column] = tensor[rows == row][:, columns == column].abs().max()
        scales = most / 448
        spread = scales[rows][:, columns]
        numbers = (tensor / spread).to(torch.float8_e4m3fn)
        return {"weight": numbers, "weight_scale_inv": scales}, numbers.float() * spread

    return quantize


def fp8_tensor(tensor: torch.Tensor) -> tuple[Mapping[str, torch.Tensor], torch.Tensor]:
    scale = tensor.abs().max() / 448
    numbers = (tensor / scale).to(torch.float8_e4m3fn)
    return {"weight": numbers, "weight_scale": scale, "input_scale": torch.ones(())}, numbers.float() * scale


def compressed(format_: str, weights: Any) -> Quantize:
    """By the compressed-tensors library: `weights` are its QuantizationArgs."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme
    from compressed_tensors.quantization.utils import calculate_qparams

    compressor: Any = BaseCompressor.get_value_from_registry(format_)
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)

    def quantize(tensor: torch.Tensor) -> tuple[Mapping[str, torch.Tensor], torch.Tensor]:
        strategy = str(getattr(weights.strategy, "value", weights.strategy))
        num_rows, num_columns = tensor.shape
        if strategy == "tensor":
            low, high = tensor.amin().reshape(1), tensor.amax().reshape(1)
        elif strategy == "channel":
            low, high = tensor.amin(dim=1, keepdim=True), tensor.amax(dim=1, keepdim=True)
        elif strategy == "group":
            split = tensor.view(num_rows, -1, weights.group_size)
            low, high = split.amin(dim=-1), split.amax(dim=-1)
        else:
            height, width = weights.block_structure
            tiles = tensor.view(num_rows // height, height, num_columns // width, width)
            low, high = tiles.amin(dim=(1, 3)), tiles.amax(dim=(1, 3))
        scale, zero_point = calculate_qparams(low, high, weights)
        state = {"weight": tensor, "weight_scale": scale, "weight_zero_point": zero_point}
        parts = dict(compressor.compress(state, scheme))
        return parts, compressor.decompress(dict(parts), scheme)["weight"].float()

    return quantize
