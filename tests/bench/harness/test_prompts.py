from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from bench.harness.pairs import PAIRS
from bench.harness.prompts import HELD_OUT_TEXT, PairPrompts, Questions
from easyspec.cli.processes import DEFAULT_BASE, DEFAULT_DRAFT
from easyspec.errors import ConfigurationError
from models.evaluation_prompts import EVALUATION_KINDS, evaluation_prompts
from models.heldout import held_out_texts


@pytest.fixture(scope="module")
def questions() -> Questions:
    """In the template of the bundled base, which is one like any other."""
    return Questions(DEFAULT_BASE)


def test_there_is_a_handful_of_questions_of_every_kind_and_none_twice() -> None:
    prompts = evaluation_prompts()
    assert tuple(prompts) == EVALUATION_KINDS
    assert all(len(of_kind) >= 8 for of_kind in prompts.values())
    every = [prompt for of_kind in prompts.values() for prompt in of_kind]
    assert len(set(every)) == len(every)
    # The corpus of the drafts' recipe is the standard library.
    assert not any(prompt in text for prompt in every for text in held_out_texts().values())


def test_questions_stand_in_the_template_and_follow_from_the_seed(questions: Questions) -> None:
    prompts = questions.of_kind("chat", 3, seed=1)
    assert prompts == questions.of_kind("chat", 3, seed=1)
    assert prompts != questions.of_kind("chat", 3, seed=2)
    asked = [next(each for each in evaluation_prompts()["chat"] if each in prompt) for prompt in prompts]
    assert all(len(prompt) > len(question) for prompt, question in zip(prompts, asked, strict=True))


def test_some_are_of_all_kinds(questions: Questions) -> None:
    some = questions.some(12, seed=3, max_chars=1000)
    for of_kind in evaluation_prompts().values():
        assert sum(any(question in prompt for question in of_kind) for prompt in some) == 2
    assert 0 < len(questions.pool(seed=3, max_chars=100)) < len(questions.pool(seed=3, max_chars=1000))


@pytest.mark.parametrize("source", [HELD_OUT_TEXT, Questions(DEFAULT_BASE)])
def test_more_than_there_are_is_refused(source: PairPrompts) -> None:
    with pytest.raises(ValueError, match="num_prompts must be at most"):
        source.of_kind(source.kinds[0], 10**6, seed=0)
    with pytest.raises(ValueError, match="num_prompts must be at most"):
        source.some(10**6, seed=0, max_chars=400)


def test_a_pair_that_is_not_here_says_how_to_get_it(tmp_path: Path) -> None:
    absent = dataclasses.replace(PAIRS["smollm2"], base=tmp_path / "x.gguf", draft=None)
    with pytest.raises(ConfigurationError, match=r"x\.gguf'; get it with `easyspec fetch smollm2`"):
        absent.check()
    drafted = dataclasses.replace(absent, draft=DEFAULT_DRAFT)
    assert drafted.checkpoints == [tmp_path / "x.gguf", DEFAULT_DRAFT]
