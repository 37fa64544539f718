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
    branches of the tree, padding) change nothing wherever they stand; across blocks the sums are added in pairs by
    position, so a segment's result depends neither on how long the others are nor on empty blocks behind its own. The
    largest score is exact in any order; the denominator is the column of ones, summed like the values.
    """
    num_heads, _, num_queries, head_dim = queries.shape
    num_blocks, is_single = len(blocks), len(blocks.counts) == 1
    if not is_single:
        queries = queries.index_select(1, blocks.segment_of)  # [A, X, Q, D]
    scores = torch.baddbmm(mask, queries.reshape(-1, num_queries, head_dim), cached[..., :head_dim].transpose(1, 2))
    largest = scores.amax(dim=2, keepdim=True)  # [A * X, Q, 1]
    if not is_single:
        largest = _largest_of(largest.view(num_heads, num_blocks, num_queries, 1), blocks)
        largest = largest.index_select(1, blocks.segment_of).view(-1, num_queries, 1)
    scores.sub_(largest).exp_()
    sums = torch.bmm(scores, cached[..., head_dim:]).view(num_heads, num_blocks, num_queries, head_dim + 1)
    total = sums if is_single else _sum_of(sums, blocks)
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


def _largest_of(values: torch.Tensor, blocks: Blocks) -> torch.Tensor:
    """The largest of each segment's blocks: [A, X, Q, 1] -> [A, B, Q, 1]."""
    if blocks.are_even:
        return values.view(values.shape[0], len(blocks.counts), -1, *values.shape[2:]).amax(dim=1)
    first, *others = torch.split(values, [*blocks.counts], dim=1)
    largest = first.contiguous()
    for other in others:
        part = largest[:, : other.shape[1]]
        torch.maximum(part, other, out=part)
    return largest


def _sum_of(values: torch.Tensor, blocks: Blocks) -> torch.Tensor:
    """The sum of each segment's blocks, [A, X, ...] -> [A, B, ...]; `values` are overwritten.

    Neighbours are added, then neighbouring pairs, and so on, by position: a block that is not there is a zero that
    nobody adds. With as many blocks in every segment each of these rounds is one operation.
    """
    if blocks.are_even:
        parts = values.view(values.shape[0], len(blocks.counts), -1, *values.shape[2:])  # [A, K, B, ...]
        while parts.shape[1] > 1:
            left, right = parts[:, 0::2], parts[:, 1::2]
            left[:, : right.shape[1]].add_(right)
            parts = left
        return parts[:, 0]
    totals = torch.split(values, [*blocks.counts], dim=1)
    distance = 1
    while distance < len(totals):
        for left, right in zip(totals[:: 2 * distance], totals[distance :: 2 * distance], strict=False):
            left[:, : right.shape[1]].add_(right)
        distance *= 2
    return totals[0]
