"""The choice rule: which token the base model says at a row, given its logits and the request's parameters.

Dimension key: `R` rows, `F` rows of a group, `V` vocabulary, `U` distinct tokens a penalty may touch, `N` noise rows.

A row's logits are processed in this order: logit bias, penalties, grammar mask, temperature, top-k, top-p, min-p. Then
the argmax wins; with a temperature, the argmax of processed logits + noise (the Gumbel-max trick).

* Repetition penalty: tokens seen in prompt, output or path. Presence and frequency penalty: output and path.
* The mask sets what the grammar forbids to -inf, whatever bias and penalties made of it; filters see the rest only.
* Temperature divides the distance to the row's best logit, so processed logits are at most 0 and nothing overflows.
* What the filters keep, and how they treat ties, stands in `filters.py`.
* Of several best tokens the lowest id wins. Filters cannot change a greedy choice and are skipped there.

A row's result is the same bits whichever rows share the call: arithmetic is element by element, and the one sum
(top-p) is taken over integers, where order does not count.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from easyspec.speculation.coupling import MIN_GUMBEL_NOISE, gumbel_noise, gumbel_of_bits, signed_seed, uniform_bits
from easyspec.speculation.filters import filter_scores_, has_filters
from easyspec.speculation.parameters import SamplingParameters
from easyspec.speculation.token_mask import mask_forbidden_
from easyspec.speculation.token_tree import TokenTree
from easyspec.speculation.transfer import is_remote, moved, to_device

# From this vocabulary on, ruling tokens out is cheaper on a CPU than making their noise.
_MIN_PRUNED_VOCAB_SIZE = 2**14
# Far above the rounding of a sum of score and noise, far below what would keep more tokens.
_PRUNING_SLACK = 1e-3
# The smallest normal float32: what is below would be flushed to zero by some devices.
_MIN_TEMPERATURE = 2.0**-126


class TokenHistory:
    """The committed tokens of a session, counted: what penalties look at.

    `token_ids` (int64 [U], each token once) and `output_counts` (float32 [U], occurrences in the output).
    """

    def __init__(self, prompt_token_ids: Sequence[int], output_token_ids: Sequence[int] = ()) -> None:
        self._slots = {token_id: slot for slot, token_id in enumerate(dict.fromkeys(prompt_token_ids))}
        self._token_ids = np.fromiter(self._slots, dtype=np.int64, count=len(self._slots))
        self._output_counts = np.zeros(len(self._slots), dtype=np.float32)
        self.commit(output_token_ids)

    @property
    def token_ids(self) -> NDArray[np.int64]:
        return self._token_ids[: len(self._slots)]

    @property
    def output_counts(self) -> NDArray[np.float32]:
        return self._output_counts[: len(self._slots)]

    @property
    def slots(self) -> dict[int, int]:
        """Index into the arrays by token id."""
        return self._slots

    def commit(self, token_ids: Sequence[int]) -> None:
        missing = (len(self._slots) + len(token_ids)) - len(self._token_ids)
        if missing > 0:
            spare = max(missing, len(self._token_ids))
            self._token_ids = np.pad(self._token_ids, (0, spare))
            self._output_counts = np.pad(self._output_counts, (0, spare))
        for token_id in token_ids:
            slot = self._slots.setdefault(token_id, len(self._slots))
            self._token_ids[slot] = token_id
            self._output_counts[slot] += 1


@dataclass(frozen=True)
class ChoiceRow:
    """Where a token is to be chosen: `position` is its absolute position (the prompt begins at 0), `path_token_ids`
    are the draft tokens between the committed ones in `history` and it; none at the root. `allowed_bits` are the
    tokens that a grammar allows there (`GrammarState.allowed_bits`, at least one); None allows all.
    """

    sampling: SamplingParameters
    position: int
    path_token_ids: tuple[int, ...]
    history: TokenHistory
    allowed_bits: NDArray[np.uint8] | None = None


def tree_choice_row(
    tree: TokenTree, row: int, base_length: int, sampling: SamplingParameters, history: TokenHistory
) -> ChoiceRow:
    """A row of the tree; `base_length` is the number of committed tokens."""
    path = tuple([tree.token_ids[seen - 1] for seen in tree.path_rows(row)])
    return ChoiceRow(sampling, base_length + len(path), path, history)


def choose_tokens(base_logits: Tensor, rows: Sequence[ChoiceRow]) -> list[int]:
    """The token chosen at each row of `base_logits` (float32 [R, V], not modified; NaN is not allowed).

    On an accelerator the host waits for the device once, for the result.
    """
    assert base_logits.shape[0] == len(rows), f"{base_logits.shape[0]} rows of logits for {len(rows)} rows"
    if not rows:
        return []
    adjusted = _adjusted(base_logits, rows)
    sampled = [index for index, row in enumerate(rows) if not row.sampling.is_greedy]
    if len(sampled) == len(rows):
        choices = _argmax_with_noise(_scores(adjusted, rows), rows)
    else:
        choices = adjusted.argmax(-1)
        if sampled:
            sampled_rows = [rows[index] for index in sampled]
            index = to_device(sampled, torch.int64, base_logits.device)
            choices[index] = _argmax_with_noise(_scores(adjusted[index], sampled_rows), sampled_rows)
    token_ids: list[int] = choices.tolist()
    return token_ids


def _adjusted(base_logits: Tensor, rows: Sequence[ChoiceRow]) -> Tensor:
    """Logits after bias, penalties and grammar mask; `base_logits` itself where no row has any."""
    biased = _grouped((index, row) for index, row in enumerate(rows) if row.sampling.logit_bias)
    penalised = _grouped((index, row) for index, row in enumerate(rows) if row.sampling.has_penalties)
    masked = {index: row.allowed_bits for index, row in enumerate(rows) if row.allowed_bits is not None}
    if not biased and not penalised and not masked:
        return base_logits
    adjusted = base_logits.clone()
    for group in biased:
        sampling = rows[group[0]].sampling
        row_index = to_device(group, torch.int64, adjusted.device).unsqueeze(1)  # [F, 1]
        token_ids = to_device(list(sampling.logit_bias), torch.int64, adjusted.device)  # [U]
        adjusted[row_index, token_ids] += to_device(list(sampling.logit_bias.values()), torch.float32, adjusted.device)
    for group in penalised:
        _penalise_(adjusted, group, [rows[index] for index in group])
    if masked:
        mask_forbidden_(adjusted, [*masked], [*masked.values()])
    return adjusted


def _grouped(rows: Iterable[tuple[int, ChoiceRow]]) -> list[list[int]]:
    """Indices of rows by session, that is by the very objects they share."""
    groups: dict[Hashable, list[int]] = {}
    for index, row in rows:
        groups.setdefault((id(row.history), id(row.sampling)), []).append(index)
    return list(groups.values())


def _penalise_(logits: Tensor, group: list[int], rows: Sequence[ChoiceRow]) -> None:
    sampling, history = rows[0].sampling, rows[0].history
    slots, num_committed = history.slots, len(history.slots)
    path_only = dict.fromkeys(token_id for row in rows for token_id in row.path_token_ids if token_id not in slots)
    column = {token_id: num_committed + extra for extra, token_id in enumerate(path_only)}
    num_columns = num_committed + len(column)
    device = logits.device
    token_ids = torch.cat([torch.from_numpy(history.token_ids), torch.tensor(list(column), dtype=torch.int64)])
    token_ids = moved(token_ids, device)  # [U]
    counts = torch.zeros(len(rows), num_columns, device=device)
    counts[:, :num_committed] = moved(torch.from_numpy(history.output_counts), device)
    on_path = [
        num_columns * index + slots.get(token_id, column.get(token_id, 0))
        for index, row in enumerate(rows)
        for token_id in row.path_token_ids
    ]
    if on_path:
        cells = to_device(on_path, torch.int64, device)
        counts.view(-1).scatter_add_(0, cells, torch.ones(len(on_path), device=device))
    row_index = to_device(group, torch.int64, device).unsqueeze(1)  # [F, 1]
    values = logits[row_index, token_ids]  # [F, U]
    repeated = torch.where(values > 0, values / sampling.repetition_penalty, values * sampling.repetition_penalty)
    seen = counts > 0
    seen_before = seen.clone()
    seen_before[:, :num_committed] = True
    values = torch.where(seen_before, repeated, values)
    values -= counts * sampling.frequency_penalty
    values -= seen * sampling.presence_penalty
    logits[row_index, token_ids] = values


def divide_by_temperature_(scores: Tensor, temperatures: Sequence[float]) -> None:
    """Scores relative to the row's best logit, float32 [R, V], become those at the rows' temperatures, above 0."""
    divisors = [[max(temperature, _MIN_TEMPERATURE)] for temperature in temperatures]
    scores.div_(to_device(divisors, torch.float32, scores.device))


def _scores(adjusted: Tensor, rows: Sequence[ChoiceRow]) -> Tensor:
    """Temperature and filters: a new tensor, 0 at a row's best token."""
    scores = adjusted - adjusted.amax(-1, keepdim=True)
    divide_by_temperature_(scores, [row.sampling.temperature for row in rows])
    vocab_size = adjusted.shape[1]
    filtered = [index for index, row in enumerate(rows) if has_filters(row.sampling, vocab_size)]
    if len(filtered) == len(rows):
        filter_scores_(scores, [row.sampling for row in rows])
    elif filtered:
        index = to_device(filtered, torch.int64, adjusted.device)
        part = scores[index]
        filter_scores_(part, [rows[i].sampling for i in filtered])
        scores[index] = part
    return scores


def _argmax_with_noise(scores: Tensor, rows: Sequence[ChoiceRow]) -> Tensor:
    return best_with_noise(scores, [(row.sampling.seed, row.position) for row in rows])[1]


def best_with_noise(
    scores: Tensor, places: Sequence[tuple[int, int]], first_token_id: int = 0
) -> tuple[Tensor, Tensor]:
    """The largest of scores + noise and its token, float32 and int64 [R]; overwrites `scores`.

    `scores` are those of the tokens from `first_token_id` on; `places` are (seed, position) of each row. Rows at one
    place of a request share their noise. On a CPU a row none of whose tokens can win may say -inf and any of them.
    """
    noise_rows: dict[tuple[int, int], list[int]] = {}
    for index, (seed, position) in enumerate(places):
        noise_rows.setdefault((signed_seed(seed), position), []).append(index)
    device, num_tokens = scores.device, scores.shape[1]
    token_ids = torch.arange(first_token_id, first_token_id + num_tokens, device=device)
    if not is_remote(scores) and num_tokens >= _MIN_PRUNED_VOCAB_SIZE:
        return _pruned_best_with_noise(scores, noise_rows, token_ids)
    seeds = to_device([seed for seed, _ in noise_rows], torch.int64, device)
    positions = to_device([position for _, position in noise_rows], torch.int64, device)
    noise = gumbel_noise(seeds, positions, token_ids)  # [N, V]
    noise_index = [0] * len(places)
    for noise_row, group in enumerate(noise_rows.values()):
        for index in group:
            noise_index[index] = noise_row
    scores += noise[to_device(noise_index, torch.int64, device)]
    best = scores.argmax(-1)
    return scores.gather(1, best.unsqueeze(1)).squeeze(1), token_ids[best]


def _pruned_best_with_noise(
    scores: Tensor, noise_rows: dict[tuple[int, int], list[int]], token_ids: Tensor
) -> tuple[Tensor, Tensor]:
    """The same, taking logarithms only for tokens that can win.

    A row's best score (of the whole vocabulary) is 0, so its winner has at least the least noise there is; a token that
    stays below that with the largest noise of this noise row cannot win. Rounding is monotonic: hence the slack is only
    for the cutoff's own rounding.
    """
    values = torch.full((len(scores),), -torch.inf)
    choices = token_ids[:1].repeat(len(scores))
    for (seed, position), group in noise_rows.items():
        bits = uniform_bits(torch.tensor([seed]), torch.tensor([position]), token_ids).squeeze(0)  # [V]
        cutoff = MIN_GUMBEL_NOISE - float(gumbel_of_bits(bits.max())) - _PRUNING_SLACK
        for index in group:
            candidates = (scores[index] >= cutoff).nonzero().squeeze(1)  # [K]
            if len(candidates):
                noisy = scores[index, candidates] + gumbel_of_bits(bits[candidates])
                best = noisy.argmax()
                values[index], choices[index] = noisy[best], token_ids[candidates[best]]
    return values, choices
