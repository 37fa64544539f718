"""The choice rule over a vocabulary that is split over ranks, without bringing the logits together.

Dimension key: `T` rows, `S` sampled rows, `V` a rank's part of the vocabulary, `R` ranks.

A greedy choice is the best of each rank's best. With a temperature every rank needs the row's best logit first, as
scores are relative to it; then the choice is the best of each rank's best score with noise. So a row costs 8 bytes a
rank, twice if sampled, where its logits are 4 V. The arithmetic is `sampling.choose_tokens`'s, element by element, and
of several best tokens the lowest id wins, as ranks hold the vocabulary in order: the same choice, always. What looks at
a row as a whole (top-k, top-p, min-p) or at more than its logits (bias, penalties, grammar, log-probabilities) is not
chosen this way.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from easyspec.speculation.filters import has_filters
from easyspec.speculation.parameters import SamplingParameters
from easyspec.speculation.sampling import ChoiceRow, best_with_noise, divide_by_temperature_
from easyspec.speculation.transfer import to_device

Gather = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class SplitRows:
    """Rows of a pass to choose tokens at: columns of equal length, which every rank has.

    `places` are (seed, position), the noise of a sampled row; temperature 0 is greedy.
    """

    rows: tuple[int, ...] = ()
    places: tuple[tuple[int, int], ...] = ()
    temperatures: tuple[float, ...] = ()

    @property
    def sampled(self) -> list[int]:
        """Indices of the rows with a temperature."""
        return [index for index, temperature in enumerate(self.temperatures) if temperature > 0.0]


NO_ROWS = SplitRows()


def can_split(sampling: SamplingParameters, vocab_size: int) -> bool:
    """Whether a choice by these parameters needs the best token alone (no log-probabilities come on top)."""
    is_plain = not (sampling.logit_bias or sampling.has_penalties or sampling.grammar)
    return is_plain and (sampling.is_greedy or not has_filters(sampling, vocab_size))


def split_rows(rows: list[int], choice_rows: list[ChoiceRow]) -> SplitRows:
    """`choice_rows` describe `rows`; all of them `can_split`."""
    return SplitRows(
        tuple(rows),
        tuple((row.sampling.seed, row.position) for row in choice_rows),
        tuple(row.sampling.temperature for row in choice_rows),
    )


def choose_split(logits: Tensor, first_token_id: int, asked: SplitRows, gather: Gather) -> Tensor:
    """The token at each row, int64 [T], on every rank.

    `logits` (float32 [T, V], NaN is not allowed) are this rank's: those of the tokens from `first_token_id` on; V may
    differ by rank, or be 0. `gather` brings [T, 2] of every rank together, [R, T, 2], at most twice.
    """
    if logits.shape[1] == 0:  # a last rank without tokens: what it says never wins
        logits = logits.new_full((len(logits), 1), -torch.inf)
    places = logits.argmax(-1, keepdim=True)
    best, choices = _best_of_ranks(logits.gather(1, places).squeeze(1), places.squeeze(1) + first_token_id, gather)
    sampled = asked.sampled
    if not sampled:
        return choices
    index = to_device(sampled, torch.int64, logits.device)
    scores = logits[index] - best[index].unsqueeze(1)  # [S, V]
    divide_by_temperature_(scores, [asked.temperatures[row] for row in sampled])
    noisy, noisy_ids = best_with_noise(scores, [asked.places[row] for row in sampled], first_token_id)
    choices[index] = _best_of_ranks(noisy, noisy_ids, gather)[1]
    return choices


def _best_of_ranks(values: Tensor, token_ids: Tensor, gather: Gather) -> tuple[Tensor, Tensor]:
    """Values float32 [T] and their tokens, of the best rank; of several the first, whose tokens are the lowest."""
    # One collective: the bits of the value beside the id.
    pairs = gather(torch.stack([values.view(torch.int32), token_ids.to(torch.int32)], dim=-1))  # [R, T, 2]
    all_values, all_ids = pairs[..., 0].contiguous().view(torch.float32), pairs[..., 1]
    winner = all_values.argmax(0, keepdim=True)  # [1, T]
    return all_values.gather(0, winner).squeeze(0), all_ids.gather(0, winner).squeeze(0).to(torch.int64)
