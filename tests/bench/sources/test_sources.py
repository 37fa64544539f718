"""`bench sources`: what is measured, and what is made of it."""

from __future__ import annotations

import pytest

from bench.decode.samples import PLAIN, Mode, Sample
from bench.harness.streams import Counts, Round
from bench.harness.tasks import TASK_NAMES, source_prompts
from bench.sources.lengths import length_gains
from bench.sources.sources import SourcesSettings, interleaved, source_sets, sources_section, summarize_sources
from easyspec.speculation.parameters import LayerPlanRequest
from easyspec.speculation.sources import ALL_SOURCES, DraftSources
from models.heldout import held_out_texts


def round_of(num_accepted: int, at_s: float, num_draft_tokens: int = 8) -> Round:
    return Round(at_s, num_accepted + 1, num_accepted, num_draft_tokens, num_draft_levels=3, draft_ns=2_000_000)


def sample(mode: Mode, kind: str, rounds: tuple[Round, ...], token_ids: tuple[int, ...] = (1, 2)) -> Sample:
    by_source = ((DraftSources.MODEL, 3), (DraftSources.NGRAM, 1))
    counts, node_budget = Counts(num_accepted_by_source=by_source), 0 if mode is PLAIN else 8
    return Sample(mode, 0.0, 0, token_ids, rounds, counts, 0.1, kind, node_budget)


FUSED = Mode("all", LayerPlanRequest(), ALL_SOURCES)


def test_a_row_is_made_of_rounds() -> None:
    plain = sample(PLAIN, "code", tuple(round_of(0, float(second), 0) for second in range(1, 5)))
    fused = sample(FUSED, "code", (round_of(0, 1.0, 0), round_of(3, 1.5), round_of(1, 2.0)))
    (result,) = summarize_sources([plain, fused])
    assert (result["task"], result["sources"], result["node_budget"]) == (
        "code",
        ["model", "retrieval", "ngram", "early_exit"],
        8,
    )
    assert result["mean_acceptance_length"] == 3.0  # (3 + 1) / 2 rounds with a tree, and the bonus token
    assert result["draft_ms_per_round"] == pytest.approx(2.0)
    assert result["tokens_per_s"] == pytest.approx(6.0)
    assert result["speedup_vs_plain"] == pytest.approx(6.0)
    assert result["accepted_by_source"] == {"model": 3, "ngram": 1}
    assert result["num_differing_completions"] == 0


def test_a_completion_that_differs_is_counted() -> None:
    rounds = (round_of(0, 1.0), round_of(0, 2.0))
    (result,) = summarize_sources([sample(PLAIN, "copy", rounds), sample(FUSED, "copy", rounds, (1, 3))])
    assert result["num_differing_completions"] == 1


def test_every_set_meets_every_budget_beside_plain_decoding() -> None:
    sets = source_sets()
    settings = SourcesSettings(node_budgets=(8, 16), num_prompts=1, max_tokens=4, seed=1)
    planned = list(interleaved([("code", "def f(x):")], settings))
    assert len(set(sets)) == 7 + 4  # of model and text sources all; early exit in the model's place and beside it
    assert len(planned) == 2 * (1 + 2 * 11)
    assert sum(each.mode == PLAIN for each in planned) == 2
    assert {each.task.budget.num_nodes for each in planned if each.task.budget is not None} == {8, 16}


@pytest.mark.parametrize("name", TASK_NAMES)
def test_tasks_are_held_out_text_and_the_same_every_time(name: str) -> None:
    prompts = source_prompts(name, 8, seed=3)
    assert prompts == source_prompts(name, 8, seed=3)
    assert len(set(prompts)) == 8
    everything = "\n".join(held_out_texts().values())
    for prompt in prompts:
        words = prompt.split()
        assert sum(word in everything for word in words) > 0.9 * len(words)


def row(sources: str, temperature: float, length: float) -> dict[str, object]:
    return {
        "task": "copy",
        "sources": sources.split("+"),
        "node_budget": 8,
        "temperature": temperature,
        "mean_acceptance_length": length,
    }


def test_fused_lengths_are_held_against_the_best_single_source() -> None:
    rows = [
        *(row("model", temperature, length) for temperature, length in ((0.0, 4.0), (0.8, 3.0))),
        *(row("ngram", temperature, length) for temperature, length in ((0.0, 6.0), (0.8, 1.5))),
        *(row("retrieval+ngram", temperature, 9.0) for temperature in (0.0, 0.8)),
        *(row("model+retrieval+ngram", temperature, length) for temperature, length in ((0.0, 8.0), (0.8, 3.3))),
    ]
    greedy, sampled, pooled = length_gains(rows)
    assert tuple(greedy.values()) == ("copy", 8, 0.0, 8.0, 6.0, "ngram")
    assert tuple(sampled.values()) == ("copy", 8, 0.8, 3.3, 3.0, "model")
    # 24 tokens greedily and 24 sampled: 6 + 8 rounds of the model, 4 + 16 of n-grams.
    assert (pooled["temperature"], pooled["best_source"]) == (None, "model")
    assert pooled["best_single"] == pytest.approx(48 / 14)
    assert pooled["fused"] / pooled["best_single"] == pytest.approx((48 / (3 + 24 / 3.3)) / (48 / 14))
    assert length_gains(rows[:4]) == length_gains(rows[4:]) == []
    assert length_gains([row("model", 0.0, 0.0), row("model+retrieval+ngram", 0.0, 2.0)]) == [], "never drafted"


def test_the_report_has_a_table_a_task() -> None:
    rounds = (round_of(0, 1.0), round_of(2, 1.5))
    results = summarize_sources([sample(PLAIN, "copy", rounds), sample(FUSED, "copy", rounds)])
    report = {
        "command": "easyspec bench sources",
        "machine": {"cpu": "c", "cores": 2, "memory_gib": 4, "torch": "2", "python": "3"},
        "commit": "abc",
        "date": "2026-01-01",
        "pair": "bundled",
        "settings": {"num_prompts": 1, "max_tokens": 4, "seed": 1},
        "results": results,
    }
    section = sources_section("sources-bundled.json", report)
    assert "| copy | model+retrieval+ngram+early_exit | 8 |" in section
