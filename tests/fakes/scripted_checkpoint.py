"""A checkpoint that says what a test wants it to say: its next token is a function of the last one alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast

from tests.fakes.checkpoints import VOCAB_SIZE, write_checkpoint
from tests.fakes.tiny_tokenizer import END_OF_TEXT

# Logits of the next token of a script; those of all others are 0.
_CERTAINTY = 12.0


def write_scripted_checkpoint(
    folder: Path, scripts: Mapping[str, Sequence[str]], special: Sequence[str], max_position_embeddings: int = 2048
) -> Path:
    """A llama checkpoint; `scripts` are what it says behind a text, which is a token: pieces, tokens too, and the end.

    Pieces in `special` are special tokens. No piece may stand in a script twice, and any two scripts with the same
    piece go on alike from there.
    """
    pieces = dict.fromkeys(piece for script in scripts.values() for piece in script)
    names = [*scripts, *pieces, *special]
    size = -(-(VOCAB_SIZE + len(names)) // 64) * 64
    write_checkpoint(
        folder,
        vocab_size=size,
        hidden_size=size,
        intermediate_size=64,
        max_position_embeddings=max_position_embeddings,
        eos_token_id=0,
        tie_word_embeddings=False,
        has_tokenizer=True,
    )
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    tokenizer.add_tokens([AddedToken(name, special=name in special, normalized=False) for name in dict.fromkeys(names)])
    tokenizer.save_pretrained(folder)
    successors: dict[int, int] = {}
    for cue, script in scripts.items():
        for token, following in pairwise(map(tokenizer.convert_tokens_to_ids, [cue, *script, END_OF_TEXT])):
            assert successors.setdefault(token, following) == following, f"{cue}: two ways to go on"
    _write_weights(folder, size, successors)
    return folder


def _write_weights(folder: Path, size: int, successors: Mapping[int, int]) -> None:
    """Layers that add nothing to an embedding, which is a coordinate of its own for each token."""
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        if name.endswith(("o_proj.weight", "down_proj.weight", "lm_head.weight")):
            tensor.zero_()
        elif name.endswith("norm.weight"):
            tensor.fill_(1.0)
    tensors["model.embed_tokens.weight"] = torch.eye(size)
    for token, following in successors.items():  # the last norm makes a coordinate's 1 the root of their number
        tensors["lm_head.weight"][following, token] = _CERTAINTY / size**0.5
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
