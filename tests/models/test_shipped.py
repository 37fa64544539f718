"""Properties of the pair that ships."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from models.heldout import held_out_prompts
from models.recipe.settings import MODELS

_BASE, _DRAFT, _SMALL = MODELS / "base", MODELS / "draft", MODELS / "base-small"
_MAX_BYTES = 48 * 1024 * 1024

pytestmark = pytest.mark.skipif(not _BASE.exists(), reason="the pair is not trained yet")


@pytest.fixture(scope="module")
def pair() -> dict[str, LlamaForCausalLM]:
    return {folder.name: AutoModelForCausalLM.from_pretrained(folder).eval() for folder in (_BASE, _SMALL, _DRAFT)}


def test_the_base_is_eight_times_the_draft(pair: dict[str, LlamaForCausalLM]) -> None:
    assert pair["base"].num_parameters() >= 8 * pair["draft"].num_parameters()
    assert pair["draft"].config.num_hidden_layers >= 8


def test_all_load_in_float32_by_default(pair: dict[str, LlamaForCausalLM]) -> None:
    assert {model.dtype for model in pair.values()} == {torch.float32}


def test_the_second_base_is_cut_from_the_first(pair: dict[str, LlamaForCausalLM]) -> None:
    small, base = pair["base-small"].config, pair["base"].config
    assert small.num_hidden_layers == len(small.kept_layers) < base.num_hidden_layers
    assert (small.hidden_size, small.vocab_size) == (base.hidden_size, base.vocab_size)
    assert pair["draft"].num_parameters() * 4 < pair["base-small"].num_parameters() < pair["base"].num_parameters()


def test_the_models_are_small() -> None:
    files = [path for folder in (_BASE, _SMALL, _DRAFT) for path in folder.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= _MAX_BYTES


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_all_have_the_same_tokenizer(name: str) -> None:
    assert (_BASE / name).read_bytes() == (_DRAFT / name).read_bytes() == (_SMALL / name).read_bytes()


def test_generation_ends_at_documents_and_turns() -> None:
    tokenizer = AutoTokenizer.from_pretrained(_BASE)
    ends = tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_end|>"])
    for folder in (_BASE, _SMALL, _DRAFT):
        config = json.loads((folder / "generation_config.json").read_text(encoding="utf-8"))
        assert config["eos_token_id"] == ends


def test_the_draft_names_its_exits() -> None:
    config = json.loads((_DRAFT / "config.json").read_text(encoding="utf-8"))
    assert config["exit_layers"] == [6, 9, 12]


@pytest.mark.parametrize("name", ["base", "base-small"])
def test_the_draft_agrees_with_both_bases_on_held_out_code(pair: dict[str, LlamaForCausalLM], name: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(_BASE)
    prompts = held_out_prompts(4, seed=1, max_chars=400)
    num_agreed = num_tokens = 0
    for prompt in prompts:
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        with torch.inference_mode():
            base, draft = (pair[each](input_ids=ids).logits.argmax(-1) for each in (name, "draft"))
        num_agreed += int((base == draft).sum())
        num_tokens += ids.numel()
    assert num_agreed > 0.4 * num_tokens
