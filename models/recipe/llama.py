"""The pair's models as ordinary transformers objects: built, compiled, saved, published."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from models.recipe.settings import ModelShape
from models.recipe.tokenizer import END_OF_TEXT, TURN_END

_INIT_STD = 0.02
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


def build_llama(shape: ModelShape, seed: int) -> LlamaForCausalLM:
    """Return a float32 model with seeded weights; the blocks' outputs start small, so that the
    residual stream of a deep model keeps its scale."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        intermediate_size=shape.mlp_size,
        max_position_embeddings=shape.max_positions,
        rope_parameters={"rope_type": "default", "rope_theta": shape.rope_theta},
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
        initializer_range=_INIT_STD,
        dtype="float32",
    )
    model = LlamaForCausalLM(config)
    for name, param in model.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            nn.init.normal_(param, std=_INIT_STD / (2 * shape.num_layers) ** 0.5)
    return model


def compile_layers(model: LlamaForCausalLM) -> None:
    """Compile each decoder layer in place; all layers share one compiled body."""
    for layer in model.model.layers:
        layer.compile()


def save_pair_member(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write weights, both configurations and the tokenizer; an existing folder is updated."""
    end, turn_end = tokenizer.convert_tokens_to_ids([END_OF_TEXT, TURN_END])
    model.generation_config = GenerationConfig(eos_token_id=[end, turn_end], pad_token_id=end, do_sample=False)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def publish_member(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path, extra_config: Mapping[str, Any]
) -> None:
    """Replace `folder` by the model with weights stored as bfloat16; `model` is left as it is.

    The configuration names float32 as the type to run in: widening bfloat16 is exact, and
    processors without bfloat16 instructions are faster in float32.
    """
    shutil.rmtree(folder, ignore_errors=True)
    rounded = LlamaForCausalLM(model.config)
    rounded.load_state_dict(model.state_dict())
    save_pair_member(rounded.to(torch.bfloat16), tokenizer, folder)
    model.config.dtype = torch.float32
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config |= {"dtype": "float32", "use_cache": True, **extra_config}
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def load_model(folder: Path, device: str) -> LlamaForCausalLM:
    """Return a saved model in float32, in evaluation mode."""
    model: LlamaForCausalLM = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.to(device).eval()
