"""Draft models for a given base model, without training one."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


def write_draft(folder: Path, base: Path, noise: float) -> Path:
    """The base model with every weight off by about `noise` of its own size; the same tokenizer."""
    generator = torch.Generator().manual_seed(1)
    shutil.copytree(base, folder, dirs_exist_ok=True)
    tensors = {
        name: tensor * (1.0 + noise * torch.randn(tensor.shape, generator=generator))
        for name, tensor in load_file(base / "model.safetensors").items()
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
