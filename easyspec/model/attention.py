"""Attention over a layout of blocks, in two forms that agree up to rounding.

Dimensions: `A` KV heads (times layers of a group), `B` segments, `Q` query rows per segment (rows x query heads per
KV head), `X` blocks of all segments, `W` columns per block, `D` head size.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from easyspec.model.row_layout import Blocks

AttentionFunction = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Blocks], torch.Tensor]


def blockwise_attention(
    queries: torch.Tensor, cached: torch.Tensor, mask: torch.Tensor, blocks: Blocks
) -> torch.Tensor:
    """Attention whose bits for a row depend on that row's own tokens and their positions only.

    queries [A, B, Q, D] float32, already scaled; cached [A * X, W, D + D + 1]: key, value and a one per
    column; mask [A * X, Q, W]. Returns [A, B, Q, D].

    Within a block the product sums its at most 192 columns one after the other, so columns of weight 0 (other
    branches of the tree, padding) change nothing wherever they stand; across blocks the sums are added in
    order of position, so a segment's result does not depend on how long the others are. The largest score is exact
    in any order; the denominator is the column of ones, summed like the values.
    """
    num_heads, _, num_queries, head_dim = queries.shape
    num_blocks, is_single = len(blocks), len(blocks.counts) == 1
    if not is_single:
        queries = queries.index_select(1, blocks.segment_of)  # [A, X, Q, D]
    scores = torch.baddbmm(mask, queries.reshape(-1, num_queries, head_dim), cached[..., :head_dim].transpose(1, 2))
    largest = scores.amax(dim=2, keepdim=True)  # [A * X, Q, 1]
    if not is_single:
        largest = _fold(largest.view(num_heads, num_blocks, num_queries, 1), blocks, _raise_to)
        largest = largest.index_select(1, blocks.segment_of).view(-1, num_queries, 1)
    scores.sub_(largest).exp_()
    sums = torch.bmm(scores, cached[..., head_dim:]).view(num_heads, num_blocks, num_queries, head_dim + 1)
    total = sums if is_single else _fold(sums, blocks, torch.Tensor.add_)
    return total[..., :head_dim] / total[..., head_dim:]  # [A, B, Q, D]


def flat_attention(queries: torch.Tensor, cached: torch.Tensor, mask: torch.Tensor, blocks: Blocks) -> torch.Tensor:
    """The same in fewer and larger operations, for guesses, whose last bits do not matter.

    The layout is flat: cached [A * X, W, D + D + 1] has a segment's blocks together, mask is [A * B, Q, X / B * W].
    """
    num_heads, num_segments, num_queries, head_dim = queries.shape
    cached = cached.view(num_heads * num_segments, -1, 2 * head_dim + 1)
    scores = torch.baddbmm(mask, queries.reshape(-1, num_queries, head_dim), cached[..., :head_dim].transpose(1, 2))
    attended = torch.bmm(scores.softmax(dim=-1), cached[..., head_dim:-1])
    return attended.view(queries.shape)  # [A, B, Q, D]


def _raise_to(largest: torch.Tensor, values: torch.Tensor) -> None:
    torch.maximum(largest, values, out=largest)


def _fold(
    values: torch.Tensor, blocks: Blocks, combine: Callable[[torch.Tensor, torch.Tensor], object]
) -> torch.Tensor:
    """Combine the blocks of each segment in order of position: [A, X, ...] -> [A, B, ...]."""
    folded = values[:, : blocks.counts[0]].contiguous()
    start = blocks.counts[0]
    for count in blocks.counts[1:]:
        combine(folded[:, :count], values[:, start : start + count])
        start += count
    return folded
