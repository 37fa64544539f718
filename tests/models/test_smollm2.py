"""The recipe of the real model's draft, on a base small enough for a test."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from easyspec.model.config import load_config
from easyspec.ops.weights import quantise
from models.recipe.smollm2.publishing import blocks_of, publish
from models.recipe.smollm2.settings import DraftSettings, Smollm2Settings
from models.recipe.smollm2.texts import WrittenText, batches, collate, read_texts, without_runs_of
from models.recipe.smollm2.training import Draft, agreement, most_named, train
from models.recipe.smollm2.writing import ASSISTANT, GIVEN, USER, Text, _choose, _save
from tests.fakes.checkpoints import VOCAB_SIZE, write_checkpoint
from tests.fakes.gguf_files import write_gguf
from tests.model.passes import Passes, random_token_ids

SETTINGS = DraftSettings(base_layers=(0, 2), num_draft_tokens=120)
NUM_KEPT = 4


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """In models this small a second thread only waits for the first."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    folder = write_checkpoint(tmp_path / "base", tie_word_embeddings=True, has_tokenizer=True)
    metadata = {"general.name": "Tiny", "general.license": "mit"}
    return write_gguf(folder, tmp_path / "base.gguf", "Q4_1", metadata=metadata)


def written(token_ids: list[int], writers: list[int], seed: int = 0) -> WrittenText:
    """A text whose likeliest tokens are those that follow, with most of the probability."""
    noise = np.random.default_rng(seed)
    follows = [token_id for token_id, writer in zip(token_ids, writers, strict=True) if writer != GIVEN]
    best_ids = noise.integers(0, VOCAB_SIZE, (len(follows), NUM_KEPT)).astype(np.uint16)
    best_ids[:, 0] = follows
    best_logprobs = np.log(np.tile([0.9, 0.05, 0.03, 0.01], (len(follows), 1))).astype(np.float16)
    return WrittenText(np.array(token_ids, np.uint16), np.array(writers, np.uint8), best_ids, best_logprobs)


def some_texts(count: int) -> list[WrittenText]:
    """A question of random tokens, whose answer counts on from its last."""
    texts = []
    for seed in range(count):
        question = random_token_ids(6, 100, seed)
        answer = [(question[-1] + step) % 100 for step in range(1, 9)]
        writers = [GIVEN] * 2 + [USER] * 4 + [ASSISTANT] * 8
        texts.append(written([*question, *answer], writers, seed))
    return texts


def test_a_batch_points_at_the_places_before_written_tokens() -> None:
    short, long = (
        written([5, 6, 7, 8], [GIVEN, USER, GIVEN, ASSISTANT]),
        written([1, 2, 3, 4, 9, 10], [GIVEN] * 3 + [ASSISTANT] * 3),
    )
    batch = collate([short, long], user_weight=0.25)
    assert batch.token_ids.tolist() == [[5, 6, 7, 8, 0, 0], [1, 2, 3, 4, 9, 10]]
    assert batch.rows.tolist() == [0, 2, 6 + 2, 6 + 3, 6 + 4]
    following = batch.token_ids.flatten()[batch.rows + 1]
    assert torch.equal(following, batch.best_ids[:, 0])
    assert batch.weights.tolist() == [0.25, 1.0, 1.0, 1.0, 1.0]


def test_an_epoch_has_every_text_once_and_follows_from_its_seed() -> None:
    texts = some_texts(50)
    epoch = [batch.token_ids for batch in batches(texts, 64, "a", 1.0)]
    rows = [tuple(row) for part in epoch for row in part.tolist()]
    assert sorted(rows) == sorted(tuple(text.token_ids.tolist()) for text in texts)
    assert all(part.numel() <= 64 for part in epoch)
    again = [batch.token_ids for batch in batches(texts, 64, "a", 1.0)]
    assert all(torch.equal(one, other) for one, other in zip(epoch, again, strict=True))
    assert [part.tolist() for part in epoch] != [b.token_ids.tolist() for b in batches(texts, 64, "b", 1.0)]


def test_texts_come_back_from_their_shard_without_repeated_questions(tmp_path: Path) -> None:
    texts = [some_texts(1)[0], *some_texts(3)]
    (tmp_path / "texts").mkdir()
    stored = [as_text(index, text) for index, text in enumerate(texts)]
    _save(tmp_path / "texts" / "00002.npz", stored, Smollm2Settings(tmp_path).writing)
    found = read_texts(tmp_path / "texts", range(4))
    assert len(found) == 3
    for one, other in zip(found, texts[1:], strict=True):
        assert np.array_equal(one.token_ids, other.token_ids)
        assert np.array_equal(one.writers, other.writers)
        assert np.array_equal(one.best_ids, other.best_ids)
        assert np.array_equal(one.best_logprobs, other.best_logprobs)


def as_text(index: int, text: WrittenText) -> Text:
    slots = np.zeros(0, np.int64)
    return Text(
        index, None, 0.0, None, slots, text.token_ids.tolist(), text.writers.tolist(),  # type: ignore[arg-type]
        [*text.best_ids], [*text.best_logprobs],
    )  # fmt: skip


def test_texts_like_what_is_held_out_are_left_out() -> None:
    texts = some_texts(4)
    held_out = texts[2].token_ids.tolist()
    assert without_runs_of(texts, [held_out[:13]]) == [texts[0], texts[1], texts[3]]
    assert without_runs_of(texts, [[*held_out[:11], VOCAB_SIZE - 1]]) == texts
    assert without_runs_of(texts, [held_out[2:7]]) == [texts[0], texts[1], texts[3]]


@pytest.mark.parametrize(("uniform", "expected"), [(0.0, 0), (0.49, 0), (0.51, 1), (0.76, 2), (0.999, 3)])
def test_sampling_falls_where_the_probabilities_say(uniform: float, expected: int) -> None:
    logprobs = np.log(np.array([0.5, 0.25, 0.15, 0.1], np.float32))
    assert _choose(logprobs, 1.0, 1.0, uniform) == expected
    assert _choose(logprobs, 0.0, 1.0, uniform) == 0
    assert _choose(logprobs, 1.0, 0.4, uniform) == 0


def test_what_the_base_says_is_named_before_low_ids() -> None:
    text = written([300, 200, 200, 200], [GIVEN, ASSISTANT, ASSISTANT, USER])
    named = most_named([text], 10, VOCAB_SIZE)
    assert named.tolist() == sorted(named.tolist())
    assert 0 in named
    assert 300 not in named
    many = [written([5] + [299] * 600, [GIVEN] + [ASSISTANT] * 600)] * 10
    assert 299 in most_named(many, 10, VOCAB_SIZE)


@pytest.mark.parametrize("bits", [4, 8])
def test_blocks_stand_for_the_same_numbers(bits: int) -> None:
    import gguf

    weight = quantise(torch.randn(6, 64), bits)
    kind = gguf.GGMLQuantizationType.Q4_1 if bits == 4 else gguf.GGMLQuantizationType.Q8_0
    read = gguf.quants.dequantize(blocks_of(weight), kind)
    assert np.allclose(read, weight.dense().numpy(), atol=1e-6)


def test_the_published_draft_computes_what_was_trained(base: Path, tmp_path: Path) -> None:
    named = torch.arange(0, VOCAB_SIZE, 3)
    draft = Draft(base, SETTINGS, named).eval()
    path = publish(draft, base, SETTINGS, tmp_path / "draft")
    config = load_config(path)
    assert (config.num_layers, config.vocab_size) == (2, VOCAB_SIZE)
    assert config.draft_vocabulary == tuple(named.tolist())
    token_ids = random_token_ids(20, VOCAB_SIZE)
    with torch.no_grad():
        hidden = draft.model.model(input_ids=torch.tensor([token_ids]), use_cache=False).last_hidden_state[0]
        expected = hidden @ draft.model.lm_head.weight[named].t()
    logits = Passes(path).prefill(token_ids)
    assert torch.allclose(logits[:, named], expected, atol=0.05 * float(expected.abs().max()))


def test_a_draft_goes_on_from_a_published_one(base: Path, tmp_path: Path) -> None:
    named = torch.arange(0, VOCAB_SIZE, 3)
    first = Draft(base, SETTINGS, named)
    with torch.no_grad():
        for parameter in first.model.model.layers.parameters():
            parameter.mul_(1.1)
    path = publish(first, base, SETTINGS, tmp_path / "draft")
    second = Draft(base, SETTINGS, named, start=path)
    for (name, one), other in zip(first.named_parameters(), second.parameters(), strict=True):
        assert torch.allclose(one, other, atol=0.01 * one.abs().max().item()), name


def test_training_learns_and_resumes(base: Path, tmp_path: Path) -> None:
    texts = some_texts(40)
    settings = Smollm2Settings(base, out=tmp_path / "out", work=tmp_path / "work", draft=SETTINGS)
    settings.work.mkdir()
    optim = replace(settings.optim, num_steps=20, tokens_per_step=140, num_warmup_steps=2, matrix_lr=1e-2)
    first, _ = train(replace(settings, optim=replace(optim, num_steps=1)), texts, texts[:8])
    before = agreement(first, texts)
    draft, effort = train(replace(settings, optim=optim), texts, texts[:8])
    after = agreement(draft, texts)
    assert effort.num_steps == 20
    assert after["top1"] > before["top1"] + 0.2
    assert after["named"] == 1.0
    again, _ = train(replace(settings, optim=optim), texts, texts[:8])
    assert all(torch.equal(a, b) for a, b in zip(draft.parameters(), again.parameters(), strict=True))
