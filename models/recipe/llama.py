"""The pair's models as ordinary transformers objects: built, compiled, saved."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from models.recipe.settings import ModelShape
from models.recipe.tokenizer import END_OF_TEXT, TURN_END

_INIT_STD = 0.02


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


def load_model(folder: Path, device: str) -> LlamaForCausalLM:
    """Return a saved model in float32, in evaluation mode."""
    model: LlamaForCausalLM = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.to(device).eval()
