"""The tokenizer must give back every text it is given."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from models.heldout import held_out_texts
from models.recipe.settings import MODELS
from models.recipe.tokenizer import END_OF_TEXT, TURN_END, TURN_START, train_tokenizer

_SHIPPED = MODELS / "base"
_UNICODE = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerFast:
    folder: Path = _SHIPPED
    if not folder.exists():
        folder = tmp_path_factory.mktemp("tokenizer")
        train_tokenizer(held_out_texts().values(), 1_024).save_pretrained(folder)
    loaded: PreTrainedTokenizerFast = AutoTokenizer.from_pretrained(folder)
    return loaded


@given(text=_UNICODE)
def test_any_text_comes_back(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    ids = tokenizer(text, add_special_tokens=True)["input_ids"]
    assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text


def test_code_comes_back_without_added_tokens(tokenizer: PreTrainedTokenizerFast) -> None:
    for name, text in held_out_texts().items():
        assert tokenizer.decode(tokenizer(text, verbose=False)["input_ids"]) == text, name


def test_a_line_break_with_indentation_is_one_token(tokenizer: PreTrainedTokenizerFast) -> None:
    assert len(tokenizer("\n        ")["input_ids"]) == 1


def test_special_tokens_are_single_and_named(tokenizer: PreTrainedTokenizerFast) -> None:
    ids = tokenizer(END_OF_TEXT + TURN_START + TURN_END)["input_ids"]
    assert ids == tokenizer.convert_tokens_to_ids([END_OF_TEXT, TURN_START, TURN_END])
    assert tokenizer.eos_token == tokenizer.pad_token == END_OF_TEXT
    assert tokenizer.bos_token is None


def test_chat_template_is_chat_ml(tokenizer: PreTrainedTokenizerFast) -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == ("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
