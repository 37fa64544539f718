"""From windows of load to one row of results per concurrency and speculation setting."""

from __future__ import annotations

import itertools
import math
import statistics
from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np

from bench.harness.streams import Outcome, Round, Speculation, Stream
from bench.harness.tables import Row
from bench.serving.load import Window

_MS_PER_S = 1e3


def summarize(concurrency: int, turns: Sequence[Sequence[Window]]) -> list[Row]:
    """One row per setting at one concurrency; a turn holds one window of each setting, which ran next to each other.

    `tokens_per_s` is the median over windows of output tokens that came in a window / its length; `vs_best` (auto only)
    is all its tokens / those of the better of off and on, which is the one that brought more over all turns (the better
    of each turn would be the luckier one of two), and `vs_best_error` its standard error by the ratios of single turns.
    Inter-token times count every token: those that came in one message share its gap evenly. `batch_sessions` and
    `batch_rows` are means over verifier steps, `batch_occupancy` is sessions / concurrency, `kv_use` the mean share of
    the verifier's KV pool. None: not known.
    """
    by_setting: dict[Speculation, list[Window]] = {setting: [] for setting in Speculation}
    for window in itertools.chain.from_iterable(turns):
        by_setting[window.speculation].append(window)
    return [
        _result(
            concurrency, setting, windows, *(_ratio_to_best(turns) if setting is Speculation.AUTO else (None, None))
        )
        for setting, windows in by_setting.items()
        if windows
    ]


def throughput(window: Window) -> float:
    """Output tokens per second inside the window."""
    num_tokens = sum(each.num_tokens for each in _rounds(window))
    return num_tokens / (window.end_s - window.start_s)


def percentiles(values_s: Sequence[float]) -> dict[str, float] | None:
    """In milliseconds, of times in seconds; None without any."""
    if not values_s:
        return None
    found = np.percentile(np.array(values_s) * _MS_PER_S, (50, 95, 99))
    return dict(zip(("p50", "p95", "p99"), found.tolist(), strict=True))


def _ratio_to_best(turns: Sequence[Sequence[Window]]) -> tuple[float | None, float | None]:
    """Auto / the better of off and on, and the ratio's standard error; None where it is not known."""
    speeds = [{window.speculation: throughput(window) for window in turn} for turn in turns]
    speeds = [speed for speed in speeds if Speculation.AUTO in speed]
    rivals = [setting for setting in (Speculation.OFF, Speculation.ON) if all(setting in speed for speed in speeds)]
    if not speeds or not rivals:
        return None, None
    better = max(rivals, key=lambda setting: sum(speed[setting] for speed in speeds))
    total = sum(speed[better] for speed in speeds)
    if total == 0:
        return None, None
    ratios = [speed[Speculation.AUTO] / speed[better] for speed in speeds if speed[better] > 0]
    error = statistics.stdev(ratios) / math.sqrt(len(ratios)) if len(ratios) > 1 else None
    return sum(speed[Speculation.AUTO] for speed in speeds) / total, error


def _result(
    concurrency: int, setting: Speculation, windows: Sequence[Window], vs_best: float | None, error: float | None
) -> Row:
    rounds = [each for window in windows for each in _rounds(window)]
    streams = [stream for window in windows for stream in window.streams]
    outcomes = Counter(stream.outcome for stream in streams)
    drafted = [each for each in rounds if each.num_draft_tokens]
    speeds = tuple(throughput(window) for window in windows)
    kv_uses = [use for window in windows for use in window.kv_uses]
    # A step with s sessions is seen s times: weighting by 1 / s counts it once.
    weights = [1 / each.num_batch_sessions for each in rounds if each.num_batch_sessions]
    num_steps = sum(weights)
    rows = sum(each.num_batch_rows / each.num_batch_sessions for each in rounds if each.num_batch_sessions)
    return {
        "concurrency": concurrency,
        "speculation": setting.value,
        "tokens_per_s": statistics.median(speeds),
        "tokens_per_s_by_window": speeds,
        "vs_best": vs_best,
        "vs_best_error": error,
        "ttft_ms": percentiles([time_s for stream in streams if (time_s := stream.time_to_first_token_s) is not None]),
        "inter_token_ms": percentiles(
            [gap for window in windows for gap in inter_token_s(window.streams, window.start_s, window.end_s)]
        ),
        "mean_acceptance_length": 1 + statistics.mean(each.num_accepted for each in drafted) if drafted else None,
        "draft_share": len(drafted) / len(rounds) if rounds else 0.0,
        "batch_occupancy": len(weights) / num_steps / concurrency if num_steps else None,
        "batch_sessions": len(weights) / num_steps if num_steps else None,
        "batch_rows": rows / num_steps if num_steps else None,
        "kv_use": statistics.mean(kv_uses) if kv_uses else None,
        "num_requests": len(streams),
        "num_complete": outcomes[Outcome.COMPLETE],
        "num_refused": outcomes[Outcome.REFUSED],
        "num_failed": outcomes[Outcome.FAILED],
    }


def _rounds(window: Window) -> Iterator[Round]:
    for stream in window.streams:
        yield from (each for each in stream.rounds if window.start_s <= each.at_s < window.end_s)


def inter_token_s(streams: Sequence[Stream], start_s: float = -math.inf, end_s: float = math.inf) -> Iterator[float]:
    """Seconds between tokens that came from `start_s` to `end_s`: those of one message share its gap evenly."""
    for stream in streams:
        for before, each in itertools.pairwise(stream.rounds):
            if start_s <= each.at_s < end_s and each.num_tokens:
                yield from [(each.at_s - before.at_s) / each.num_tokens] * each.num_tokens
