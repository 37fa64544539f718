"""Attention over a layout of blocks, in two forms that agree up to rounding.

Dimensions: `X` batched matrices (KV heads x segments, times layers of a group), `Q` query rows
(rows x query heads per KV head), `K` blocks, `W` columns per block, `D` head size.
"""

from __future__ import annotations

import torch


def blockwise_attention(
    queries: torch.Tensor, cached: torch.Tensor, mask: torch.Tensor, num_blocks: int
) -> torch.Tensor:
    """Attention whose bits for a row depend on that row's own tokens and their positions only.

    queries [X, Q, D] float32, already scaled; cached [X, K * W, D + D + 1]: key, value and a one per
    column; mask [X * K, Q, W]. Returns [X, Q, D].

    Within a block the product sums its at most 192 columns one after the other, so columns of weight 0 (other
    branches of the tree, padding) change nothing wherever they stand; across blocks the sums are added in
    order of position, so further blocks of weight 0 change nothing either. The largest score is exact
    in any order; the denominator is the column of ones, summed like the values.
    """
    num_matrices, num_queries, head_dim = queries.shape
    cached = cached.view(num_matrices * num_blocks, -1, 2 * head_dim + 1)
    if num_blocks > 1:
        queries = queries.repeat_interleave(num_blocks, dim=0)  # [X * K, Q, D]
    scores = torch.baddbmm(mask, queries, cached[..., :head_dim].transpose(1, 2))  # [X * K, Q, W]
    by_block = scores.view(num_matrices, num_blocks, num_queries, -1)
    by_block.sub_(by_block.amax(dim=(1, 3), keepdim=True)).exp_()
    sums = torch.bmm(scores, cached[..., head_dim:])
    sums = sums.view(num_matrices, num_blocks, num_queries, head_dim + 1)
    total = sums[:, 0]
    for block in range(1, num_blocks):
        total = total + sums[:, block]
    return total[..., :head_dim] / total[..., head_dim:]  # [X, Q, D]


def flat_attention(queries: torch.Tensor, cached: torch.Tensor, mask: torch.Tensor, num_blocks: int) -> torch.Tensor:
    """The same in fewer and larger operations, for guesses, whose last bits do not matter."""
    num_matrices, num_queries, head_dim = queries.shape
    if num_blocks > 1:
        mask = mask.view(num_matrices, num_blocks, num_queries, -1).transpose(1, 2)
        mask = mask.reshape(num_matrices, num_queries, -1)
    scores = torch.baddbmm(mask, queries, cached[..., :head_dim].transpose(1, 2))  # [X, Q, K * W]
    return torch.bmm(scores.softmax(dim=-1), cached[..., head_dim:-1])  # [X, Q, D]
