"""Hand-made samples with figures that are easy to check by head."""

from __future__ import annotations

from bench.decode.samples import Mode, Sample
from bench.harness.streams import Counts, Round

MS = 1_000_000


def make_round(at_s: float, num_tokens: int, num_levels: int = 0, draft_ms: int = 0, fuzzy_ms: int = 0) -> Round:
    return Round(
        at_s=at_s,
        num_tokens=num_tokens,
        num_accepted=num_tokens - 1,
        num_draft_tokens=2 * num_levels,
        num_draft_levels=num_levels,
        num_fuzzy_steps=max(num_levels - 1, 0),
        draft_ns=draft_ms * MS,
        calibrate_ns=(draft_ms - fuzzy_ms) * MS,
        fuzzy_ns=fuzzy_ms * MS,
        verify_ns=20 * MS,
        compute_ns=18 * MS,
        round_ns=(draft_ms + 21) * MS,
    )


def plain_sample(mode: Mode, prompt_index: int, seconds_per_token: float, token_ids: tuple[int, ...]) -> Sample:
    rounds = tuple(make_round(1.0 + i * seconds_per_token, 1) for i in range(len(token_ids)))
    return Sample(mode, 0.0, prompt_index, token_ids, rounds, Counts(), 1.0)


def drafted_sample(mode: Mode, prompt_index: int, round_s: float, token_ids: tuple[int, ...]) -> Sample:
    """One token at first, then three tokens a round from trees of five levels."""
    num_rounds, rest = divmod(len(token_ids) - 1, 3)
    assert rest == 0
    rounds = [make_round(1.0, 1)]
    rounds += [make_round(1.0 + (i + 1) * round_s, 3, 5, draft_ms=10, fuzzy_ms=8) for i in range(num_rounds)]
    counts = Counts((num_rounds,) * 5, (num_rounds, num_rounds))
    return Sample(mode, 0.0, prompt_index, token_ids, tuple(rounds), counts, 1.0)
