"""The first token behind long prompts: prompts that are new to everyone, and medians of what was timed."""

from __future__ import annotations

import pytest

from bench.alternatives.prefill import FirstToken, long_prompts, prefill_headline, prefill_section, summarize_prefill
from bench.alternatives.timed_completion import Maker
from easyspec.checkpoint.tokenizer_files import load_tokenizer
from easyspec.cli.processes import DEFAULT_BASE
from easyspec.errors import ConfigurationError

OURS, OTHER, SLOW_OTHER = Maker("easyspec"), Maker("other"), Maker("other", "slow")


def test_prompts_are_as_long_as_asked_for_and_begin_differently() -> None:
    prompts = long_prompts(DEFAULT_BASE, 64, 5)
    tokenizer = load_tokenizer(DEFAULT_BASE)
    assert all(len(tokenizer.encode(prompt)) == pytest.approx(64, abs=4) for prompt in prompts)
    assert len({prompt[:20] for prompt in prompts}) == 5


def test_no_more_prompts_than_there_is_text() -> None:
    with pytest.raises(ConfigurationError, match=r"prompts of 1000000 tokens; allowed: .* in all"):
        long_prompts(DEFAULT_BASE, 1_000_000, 2)


def test_medians_over_prompts_and_ratios_within_a_prompt() -> None:
    seconds = {OURS: [0.1, 0.2, 0.4], OTHER: [0.1, 0.1, 0.1], SLOW_OTHER: [0.05, 1.0, 1.0]}
    first_tokens = [
        FirstToken(maker, 100, index, elapsed_s)
        for index in range(3)
        for maker, times in seconds.items()
        for elapsed_s in [times[index]]
    ]
    ours, other, _ = summarize_prefill(first_tokens)
    assert (ours["program"], ours["prompt_tokens"], ours["tokens_per_s"]) == ("easyspec", 100, pytest.approx(500))
    assert ours["first_token_ms"] == pytest.approx(200)
    assert ours["vs_best_other"] == pytest.approx(0.5)  # of 0.5, 0.5 and 0.25
    assert other["vs_best_other"] == pytest.approx(1.0)


def test_alone_there_is_no_other() -> None:
    (ours,) = summarize_prefill([FirstToken(OURS, 100, 1, 0.5)])
    assert ours["vs_best_other"] is None


def test_the_page_has_a_row_for_everyone() -> None:
    first_tokens = [FirstToken(maker, 512, 1, 0.5) for maker in (OURS, OTHER)]
    report = {
        "pair": "bundled",
        "command": "easyspec bench prefill",
        "machine": {"cpu": "a", "cores": 2, "memory_gib": 8, "torch": "2", "python": "3", "executor": "native"},
        "commit": "abc",
        "date": "2026-12-01",
        "weights": {},
        "settings": {"num_prompts": 1},
        "results": summarize_prefill(first_tokens),
    }
    page = prefill_section("prefill-bundled.json", report)
    assert "| easyspec, plain | 512 | 500.0 | 1024 | 1.00 |" in page
    assert "| other, plain | 512 | 500.0 | 1024 | 1.00 |" in page
    assert prefill_headline(report) in page
