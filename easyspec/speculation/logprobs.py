"""Log-probabilities of the base model: log softmax of its raw logits, before any processing of the request's.

Dimension key: `R` rows, `V` vocabulary.

Rows are treated one at a time, each in memory of its own: what a sum over a row comes to may depend on the shape and
the alignment of the tensor around it, and a token's log-probability must be the same bits in every batch and tree.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from easyspec.speculation.messages import TokenLogprobs
from easyspec.speculation.transfer import is_remote, to_device


def token_logprobs(base_logits: Tensor, token_ids: Sequence[int], num_top: int) -> tuple[TokenLogprobs, ...]:
    """One entry per row of `base_logits` (float32 [R, V]): the row's token in `token_ids`, and the `num_top` likeliest.

    Equally likely tokens stand in the order of their ids.
    """
    return row_logprobs(base_logits, token_ids, [num_top] * len(token_ids))


def row_logprobs(base_logits: Tensor, token_ids: Sequence[int], num_tops: Sequence[int]) -> tuple[TokenLogprobs, ...]:
    """The same for rows that each want another number of the likeliest.

    On an accelerator the host waits for the device once, for the result.
    """
    assert len(base_logits) == len(token_ids) == len(num_tops), f"{len(token_ids)} tokens for {len(base_logits)} rows"
    if not token_ids:
        return ()
    own_ids = to_device([[token_id] for token_id in token_ids], torch.int64, base_logits.device)
    counts = [min(num_top, base_logits.shape[1]) for num_top in num_tops]
    found = [_found(row, own, count) for row, own, count in zip(base_logits, own_ids, counts, strict=True)]
    numbers: list[float] = torch.cat(found).tolist()
    entries, begin = [], 0
    for count in counts:
        ids, values = (numbers[begin + half * (count + 1) :][: count + 1] for half in (0, 1))
        top = tuple((int(token_id), value) for token_id, value in zip(ids[:-1], values[:-1], strict=True))
        entries.append(TokenLogprobs(values[-1], top))
        begin += 2 * (count + 1)
    return tuple(entries)


def _found(row: Tensor, own_id: Tensor, num_top: int) -> Tensor:
    """Ids of the best and the row's own, then their log-probabilities: float64 [2 * (num_top + 1)]."""
    row = row.double()  # [V], a copy
    wanted = torch.cat([_best(row, num_top), own_id])
    values = (row[wanted] - row.logsumexp(0)).float()
    return torch.cat([wanted.double(), values.double()])  # exact: ids are far below 2**53


def _best(row: Tensor, num_top: int) -> Tensor:
    """Ids of the best `num_top`, int64; of equals the lower id first, which `topk` does not promise."""
    if num_top == 0:
        return torch.empty(0, dtype=torch.int64, device=row.device)
    if is_remote(row):  # only a CPU may look at a result in between; a GPU sorts whole rows quickly
        return row.sort(descending=True, stable=True).indices[:num_top]
    cutoff = row.topk(num_top).values[-1]
    candidates = (row >= cutoff).nonzero().squeeze(1)  # ascending ids
    order = row[candidates].argsort(descending=True, stable=True)
    return candidates[order][:num_top]
