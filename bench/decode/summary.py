"""From samples to one row of results per mode and temperature."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Iterable, Sequence

from bench.decode.samples import PLAIN, Mode, Sample
from bench.harness.streams import Round
from bench.harness.tables import Row

_NS_PER_MS = 1e6


def summarize(samples: Sequence[Sample]) -> list[Row]:
    """One row per (temperature, mode), in the order they first occur; plain must be among the samples.

    Times are milliseconds per round: the mean over a completion's rounds after the second, then the median over
    prompts. Speeds are medians over prompts, ratios medians of per-prompt ratios. Acceptance is pooled over all
    rounds. None: does not apply to plain decoding, or nothing was measured.
    """
    keys = list(dict.fromkeys((sample.temperature, sample.mode) for sample in samples))
    return [_row(mode, temperature, samples) for temperature, mode in sorted(keys, key=lambda key: key[0])]


def _row(mode: Mode, temperature: float, samples: Sequence[Sample]) -> Row:
    own = [sample for sample in samples if (sample.mode, sample.temperature) == (mode, temperature)]
    plain = {s.prompt_index: s for s in samples if (s.mode, s.temperature) == (PLAIN, temperature)}
    pairs = [(sample.tokens_per_s, plain[sample.prompt_index].tokens_per_s) for sample in own]
    ratios = [speed / plain_speed for speed, plain_speed in pairs if speed is not None and plain_speed is not None]
    plan = mode.layer_plan
    drafted = [item for sample in own for item in sample.rounds if item.num_draft_levels]
    num_accepted = sum(item.num_accepted for item in drafted)
    drafted_levels = _sum_levels(sample.counts.num_drafted_by_level for sample in own)
    accepted_levels = _sum_levels(sample.counts.num_accepted_by_level for sample in own)
    low, _, high = statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else (None, None, None)
    num_draft_tokens = sum(item.num_draft_tokens for item in drafted)
    return {
        "mode": mode.name,
        "temperature": temperature,
        "layer_parallel_size": plan.layer_parallel_size if plan else None,
        "mlp": plan.mlp.value if plan and plan.mlp else None,
        "calibration": plan.calibration if plan else None,
        "num_completions": len(own),
        "num_output_tokens": sum(len(sample.token_ids) for sample in own),
        "tokens_per_s": _median(sample.tokens_per_s for sample in own),
        "speedup_vs_plain": _median(ratios),
        "speedup_quartiles": None if low is None or high is None else (low, high),
        "time_to_first_token_ms": _median(1e3 * sample.time_to_first_token_s for sample in own),
        "round_ms": _ms(own, lambda item: item.round_ns),
        "draft_ms_per_round": _ms(own, lambda item: item.draft_ns) if plan else None,
        "calibrate_ms_per_round": _ms(own, lambda item: item.calibrate_ns) if plan else None,
        "fuzzy_ms_per_round": _ms(own, lambda item: item.fuzzy_ns) if plan else None,
        "fuzzy_ms_per_step": _median(_fuzzy_ms_per_step(sample) for sample in own) if plan else None,
        "verify_ms_per_round": _ms(own, lambda item: item.verify_ns),
        "verify_compute_ms_per_round": _ms(own, lambda item: item.compute_ns),
        "overhead_ms_per_round": _ms(own, lambda item: item.round_ns - item.draft_ns - item.verify_ns),
        # The paper's rate: accepted levels / drafted levels.
        "acceptance_rate": sum(accepted_levels) / sum(drafted_levels) if any(drafted_levels) else None,
        "acceptance_by_level": tuple(
            hits / tries if tries else 0.0
            for hits, tries in itertools.zip_longest(accepted_levels, drafted_levels, fillvalue=0)
        ),
        "mean_acceptance_length": 1 + num_accepted / len(drafted) if drafted else None,
        "draft_token_acceptance_rate": num_accepted / num_draft_tokens if num_draft_tokens else None,
        "draft_tokens_per_round": num_draft_tokens / len(drafted) if drafted else None,
        "num_drafter_failures": sum(sample.counts.num_drafter_failures for sample in own),
        "num_differing_completions": sum(sample.token_ids != plain[sample.prompt_index].token_ids for sample in own),
    }


def _ms(samples: Iterable[Sample], cost_ns: Callable[[Round], int]) -> float | None:
    return _median(
        statistics.fmean(cost_ns(item) for item in sample.steady_rounds) / _NS_PER_MS
        for sample in samples
        if sample.steady_rounds
    )


def _fuzzy_ms_per_step(sample: Sample) -> float | None:
    num_steps = sum(item.num_fuzzy_steps for item in sample.steady_rounds)
    fuzzy_ns = sum(item.fuzzy_ns for item in sample.steady_rounds)
    return fuzzy_ns / num_steps / _NS_PER_MS if num_steps else None


def _sum_levels(counts: Iterable[Sequence[int]]) -> list[int]:
    return [sum(level) for level in itertools.zip_longest(*counts, fillvalue=0)]


def _median(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None
