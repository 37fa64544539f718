"""Writing a trained model as the checkpoint that ships: rounded weights, both configurations."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from models.recipe.llama import save_pair_member

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


def publish_member(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    folder: Path,
    extra_config: Mapping[str, Any],
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
