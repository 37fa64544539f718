"""What a decode benchmark measures, as plain data: modes, rounds, samples."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from dataclasses import dataclass

from easyspec.speculation.parameters import LayerPlanRequest, MlpPlacement
from easyspec.speculation.sources import DraftSources

LAYER_PARALLEL_SIZES = (2, 3, 4, 6)


@dataclass(frozen=True)
class Mode:
    """One way to decode; `layer_plan` is None for plain decoding, `sources` says who guesses."""

    name: str
    layer_plan: LayerPlanRequest | None = None
    sources: DraftSources = DraftSources.MODEL


PLAIN = Mode("plain")
SEQUENTIAL = Mode("sequential", LayerPlanRequest(1, MlpPlacement.SEQUENTIAL))


def all_modes() -> tuple[Mode, ...]:
    """Plain, sequential drafting, then every layer-parallel plan with and without calibration."""
    parallel = [
        _parallel_mode(size, mlp, calibration)
        for size in LAYER_PARALLEL_SIZES
        for mlp in MlpPlacement
        for calibration in (True, False)
    ]
    return (PLAIN, SEQUENTIAL, *parallel)


def _parallel_mode(size: int, mlp: MlpPlacement, calibration: bool) -> Mode:
    name = f"n{size}-{mlp.value}" + ("" if calibration else "-uncalibrated")
    return Mode(name, LayerPlanRequest(size, mlp, calibration))


def select_modes(patterns: Sequence[str]) -> tuple[Mode, ...]:
    """Return the modes whose name matches a shell pattern; plain always comes first.

    Raises ValueError for a pattern that matches nothing.
    """
    names = [mode.name for mode in all_modes()]
    for pattern in patterns:
        if not fnmatch.filter(names, pattern):
            raise ValueError(f"{pattern!r} matches none of {', '.join(names)}")
    chosen = [mode for mode in all_modes() if any(fnmatch.fnmatch(mode.name, pattern) for pattern in patterns)]
    return (PLAIN, *(mode for mode in chosen if mode != PLAIN))


@dataclass(frozen=True)
class Round:
    """One message of the stream: what the client saw (`arrival_s`, its own clock) and the gateway reported."""

    arrival_s: float
    num_tokens: int
    num_accepted: int
    num_draft_tokens: int
    num_draft_levels: int
    num_fuzzy_steps: int
    draft_ns: int
    calibrate_ns: int
    fuzzy_ns: int
    verify_ns: int
    compute_ns: int
    round_ns: int


@dataclass(frozen=True)
class Sample:
    """One completion of one prompt in one mode; levels count from the first below the root."""

    mode: Mode
    temperature: float
    prompt_index: int
    token_ids: tuple[int, ...]
    rounds: tuple[Round, ...]
    num_drafted_by_level: tuple[int, ...]
    num_accepted_by_level: tuple[int, ...]
    num_drafter_failures: int
    time_to_first_token_s: float
    num_accepted_by_source: tuple[tuple[DraftSources, int], ...] = ()
    num_ahead_hits: int = 0
    num_ahead_misses: int = 0

    @property
    def decode_rounds(self) -> tuple[Round, ...]:
        """All rounds but the first, in which the verifier reads the prompt."""
        return self.rounds[1:]

    @property
    def steady_rounds(self) -> tuple[Round, ...]:
        """All rounds but the first two: the second may wait until the drafter has read the prompt."""
        return self.rounds[2:]

    @property
    def tokens_per_s(self) -> float | None:
        """Speed of the decode phase: tokens after the first round / time since it arrived.

        The first round of a drafted completion carries more than one token; counting those would give
        speculation tokens for free. None if the completion ended in its first round.
        """
        if len(self.rounds) < 2:
            return None
        num_tokens = sum(item.num_tokens for item in self.decode_rounds)
        return num_tokens / (self.rounds[-1].arrival_s - self.rounds[0].arrival_s)
