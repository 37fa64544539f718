"""The draft of SmolLM2-135M-Instruct that ships, for those who name it."""

from __future__ import annotations

import pytest
import torch

from easyspec.cli.models import choose_models, find_model
from easyspec.cli.packaged_models import SMOLLM2
from easyspec.model.config import load_config
from easyspec.tokenizer_fingerprint import tokenizer_fingerprint
from tests.model.passes import Passes

_DRAFT = find_model("smollm2-draft")
_MAX_BYTES = 40 * 1024 * 1024


def test_it_is_small() -> None:
    assert _DRAFT.stat().st_size <= _MAX_BYTES


def test_it_names_a_sixth_of_the_vocabulary_in_two_layers() -> None:
    config = load_config(_DRAFT)
    assert (config.num_layers, config.vocab_size) == (2, 49_152)
    assert len(config.draft_vocabulary or ()) == 8_192


def test_it_guesses_what_every_base_would_say() -> None:
    """After "The capital of France is": a space and a capital, not one of 49 152 at random."""
    logits = Passes(_DRAFT).prefill([504, 3575, 282, 4649, 314])[-1]
    assert logits.isfinite().sum() == 8_192
    assert torch.softmax(logits, 0).max() > 0.05


def test_it_drafts_for_the_model_that_it_was_made_for() -> None:
    if not SMOLLM2.is_here:
        pytest.skip("SmolLM2 is not here: `easyspec fetch smollm2`")
    assert tokenizer_fingerprint(_DRAFT) == tokenizer_fingerprint(SMOLLM2.path)
    assert choose_models("smollm2", draft="smollm2-draft").draft == _DRAFT
    assert choose_models("smollm2").drafts_from_text
