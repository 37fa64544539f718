"""Of models of text and pictures the text tower is run, and says what it says by itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from easyspec.errors import ConfigurationError
from easyspec.model.loading import load_model
from tests.fakes.checkpoints import VOCAB_SIZE, change_config, reference_model, write_checkpoint
from tests.fakes.families import FAMILY_OPTIONS
from tests.model.passes import Passes, random_token_ids
from tests.model.test_loading import Settings

# By the whole model's type: its tower's.
TOWERS = {"mistral3": "mistral", "gemma3": "gemma3_text"}
# Where published checkpoints and newer ones keep the tower's tensors.
PREFIXES: dict[str, dict[str, str]] = {
    "published": {"model.": "language_model.model.", "lm_head.": "language_model.lm_head."},
    "newer": {"model.": "model.language_model.", "lm_head.": "lm_head."},
}
TOKEN_IDS = random_token_ids(50, VOCAB_SIZE)


def write_tower(folder: Path, model_type: str, prefixes: dict[str, str]) -> torch.Tensor:
    """A whole model's checkpoint in `folder`, with a tensor of another part; returns what its tower says."""
    tower = TOWERS[model_type]
    write_checkpoint(folder, tower, has_tokenizer=True, **FAMILY_OPTIONS[tower])
    with torch.inference_mode():
        expected: torch.Tensor = reference_model(folder, attn_implementation="eager")(torch.tensor([TOKEN_IDS])).logits[
            0
        ]
    tensors = {_renamed(name, prefixes): value for name, value in load_file(folder / "model.safetensors").items()}
    tensors["vision_tower.patch_conv.weight"] = torch.ones(2, 2)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    text: dict[str, Any] = json.loads((folder / "config.json").read_text())
    config = {"model_type": model_type, "text_config": text, "dtype": "float32", "eos_token_id": 0}
    (folder / "config.json").write_text(json.dumps(config))
    return expected


def _renamed(name: str, prefixes: dict[str, str]) -> str:
    stem = next(stem for stem in prefixes if name.startswith(stem))
    return prefixes[stem] + name.removeprefix(stem)


@pytest.mark.parametrize("model_type", TOWERS)
@pytest.mark.parametrize("layout", PREFIXES)
def test_the_tower_says_what_it_says_alone(tmp_path: Path, model_type: str, layout: str) -> None:
    expected = write_tower(tmp_path, model_type, PREFIXES[layout])
    assert (Passes(tmp_path, executor="reference").prefill(TOKEN_IDS) - expected).abs().max() < 1e-4
    load_model(Settings(str(tmp_path)))


def test_another_tower_is_refused(tmp_path: Path) -> None:
    write_tower(tmp_path, "mistral3", PREFIXES["newer"])
    config = json.loads((tmp_path / "config.json").read_text())
    change_config(tmp_path, text_config=config["text_config"] | {"model_type": "gpt2"})
    with pytest.raises(ConfigurationError, match="text_config's model_type is 'gpt2'"):
        Passes(tmp_path)
