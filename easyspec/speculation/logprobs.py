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


def token_logprobs(base_logits: Tensor, token_ids: Sequence[int], num_top: int) -> tuple[TokenLogprobs, ...]:
    """One entry per row of `base_logits` (float32 [R, V]): the row's token in `token_ids`, and the `num_top` likeliest.

    Equally likely tokens stand in the order of their ids.
    """
    assert len(base_logits) == len(token_ids), f"{len(token_ids)} tokens for {len(base_logits)} rows"
    return tuple(_entry(row, token_id, num_top) for row, token_id in zip(base_logits, token_ids, strict=True))


def _entry(row: Tensor, token_id: int, num_top: int) -> TokenLogprobs:
    row = row.double()  # [V], a copy
    best_ids = _best(row, min(num_top, len(row)))
    wanted = torch.cat([best_ids, best_ids.new_tensor([token_id])])
    values = (row[wanted] - row.logsumexp(0)).float().tolist()
    return TokenLogprobs(values[-1], tuple(zip(best_ids.tolist(), values[:-1], strict=True)))


def _best(row: Tensor, num_top: int) -> Tensor:
    """Ids of the best `num_top`, int64; of equals the lower id first, which `topk` does not promise."""
    if num_top == 0:
        return torch.empty(0, dtype=torch.int64, device=row.device)
    cutoff = row.topk(num_top).values[-1]
    candidates = (row >= cutoff).nonzero().squeeze(1)  # ascending ids
    order = row[candidates].argsort(descending=True, stable=True)
    return candidates[order][:num_top]
