"""The trained draft as a GGUF file: the base's metadata and tokenizer, fewer layers, and the tokens that it names."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import torch
from gguf.constants import GGMLQuantizationType, GGUFValueType
from numpy.typing import NDArray
from torch import Tensor

from easyspec.checkpoint.gguf_header import read_header
from easyspec.model.gguf_config import DRAFT_VOCABULARY
from easyspec.ops.weights import GROUP_SIZE, QuantisedWeight, quantise
from models.recipe.smollm2.settings import DraftSettings
from models.recipe.smollm2.training import Draft

FILE_NAME = "draft.gguf"
_KINDS = {4: GGMLQuantizationType.Q4_1, 8: GGMLQuantizationType.Q8_0}


def publish(draft: Draft, base: Path, settings: DraftSettings, folder: Path) -> Path:
    """Write `folder`/draft.gguf, taking what is not trained from the base's GGUF file; returns its path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / FILE_NAME
    metadata = {key: value for key, value in read_header(base).metadata.items() if value != []}  # it takes none empty
    architecture = str(metadata.pop("general.architecture"))
    metadata["general.name"] = f"Draft of {metadata['general.name']}"
    metadata[f"{architecture}.block_count"] = len(settings.base_layers)
    metadata[DRAFT_VOCABULARY] = draft.named.tolist()
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in metadata.items():
        kind = GGUFValueType.UINT32 if type(value) is int else GGUFValueType.get_type(value)
        writer.add_key_value(key, value, kind)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, len(settings.base_layers))
    config = draft.model.config
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, parameter in draft.model.named_parameters():
        values, num_heads = parameter.detach(), heads.get(name.split(".")[-2])
        gguf_name = names.get_name(name, try_suffixes=(".weight",))
        assert gguf_name is not None, "a Llama's parameter"
        if num_heads is not None:
            # Of queries and keys llama.cpp turns neighbouring rows against each other, Hugging Face i and i + D / 2.
            values = values.view(num_heads, 2, -1, values.shape[1]).transpose(1, 2).reshape(values.shape)
        if values.dim() == 1:
            writer.add_tensor(gguf_name, values.numpy())
            continue
        bits = settings.table_bits if name == "model.embed_tokens.weight" else settings.layer_bits
        writer.add_tensor(gguf_name, blocks_of(quantise(values, bits)), raw_dtype=_KINDS[bits])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def blocks_of(weight: QuantisedWeight) -> NDArray[np.uint8]:
    """The weight as ggml's blocks, Q4_1 or Q8_0: uint8 [O, bytes of a row]. Its inputs are whole groups."""
    codes = weight.codes.view(len(weight.codes), -1, GROUP_SIZE)  # [O, groups, 32]
    parts = [_half_bytes(weight.scales)]
    if weight.bits == 4:
        assert weight.minima is not None, "4 bits are written with a minimum"
        low, high = codes.chunk(2, dim=2)
        parts += [_half_bytes(weight.minima), (low | high << 4).to(torch.uint8)]
    else:
        parts += [codes.view(torch.uint8)]
    blocks: NDArray[np.uint8] = torch.cat(parts, dim=2).flatten(1).numpy()
    return blocks


def _half_bytes(values: Tensor) -> Tensor:
    return values.half()[..., None].view(torch.uint8)  # [O, groups, 2]
