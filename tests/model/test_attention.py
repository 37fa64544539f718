"""Both forms of attention against torch's own; tolerance 1e-5 absolute, where outputs are about 1."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.nn import functional

from easyspec.model.attention import blockwise_attention, flat_attention

Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, int], torch.Tensor]
FORMS: tuple[Attention, ...] = (blockwise_attention, flat_attention)
_MINUS_INFINITY = float("-inf")


class Inputs:
    """Random queries [X, Q, D], cached columns [X, K * W, 2 * D + 1] and a mask [X * K, Q, W]."""

    def __init__(self, num_blocks: int, width: int, seed: int, scale: float = 1.0) -> None:
        num_matrices, num_queries, head_dim = 6, 5, 16
        generator = torch.Generator().manual_seed(seed)
        self.num_blocks = num_blocks
        self.queries = scale * torch.randn(num_matrices, num_queries, head_dim, generator=generator)
        pairs = torch.randn(num_matrices, num_blocks * width, 2 * head_dim, generator=generator)
        self.cached = torch.cat([pairs, torch.ones(num_matrices, num_blocks * width, 1)], dim=-1)
        visible = torch.rand(num_matrices, num_queries, num_blocks * width, generator=generator) < 0.4
        visible[:, :, 0] = True  # a row that sees nothing has no answer
        self.visible = visible

    @property
    def mask(self) -> torch.Tensor:
        num_matrices, num_queries, _ = self.visible.shape
        mask = torch.zeros(self.visible.shape).masked_fill(~self.visible, _MINUS_INFINITY)
        by_block = mask.view(num_matrices, num_queries, self.num_blocks, -1).transpose(1, 2)
        return by_block.reshape(num_matrices * self.num_blocks, num_queries, -1)

    def attend(self, attention: Attention) -> torch.Tensor:
        return attention(self.queries.clone(), self.cached.clone(), self.mask, self.num_blocks)

    def expected(self) -> torch.Tensor:
        head_dim = self.queries.shape[-1]
        keys, values = self.cached[..., :head_dim], self.cached[..., head_dim:-1]
        return functional.scaled_dot_product_attention(self.queries, keys, values, attn_mask=self.visible, scale=1.0)


@pytest.mark.parametrize(("num_blocks", "width"), [(1, 1), (1, 128), (2, 128), (3, 144), (5, 8)])
@pytest.mark.parametrize("seed", range(2))
def test_both_forms_are_softmax_attention(num_blocks: int, width: int, seed: int) -> None:
    inputs = Inputs(num_blocks, width, seed)
    results = [inputs.attend(attention) for attention in FORMS]
    for result in results:
        torch.testing.assert_close(result, inputs.expected(), atol=1e-5, rtol=0.0)
    torch.testing.assert_close(results[0], results[1], atol=1e-5, rtol=0.0)


@pytest.mark.parametrize("attention", FORMS)
def test_neither_form_overflows(attention: Attention) -> None:
    """Scores of several hundred: e^x of them is infinite in float32 unless the largest is taken off first."""
    inputs = Inputs(3, 16, seed=0, scale=100.0)
    scores = inputs.queries @ inputs.cached[..., :16].transpose(1, 2)
    assert scores.max() > 500.0
    torch.testing.assert_close(inputs.attend(attention), inputs.expected(), atol=1e-3, rtol=0.0)


def test_the_inputs_are_left_alone() -> None:
    for attention in FORMS:
        inputs = Inputs(2, 16, seed=0)
        queries, cached, mask = inputs.queries.clone(), inputs.cached.clone(), inputs.mask
        kept = mask.clone()
        attention(queries, cached, mask, 2)
        assert torch.equal(queries, inputs.queries)
        assert torch.equal(cached, inputs.cached)
        assert torch.equal(mask, kept)  # one mask serves all layers of a pass


def test_columns_and_blocks_out_of_sight_change_no_bit() -> None:
    """Other branches of a tree and blocks behind a row's own: their contents and their number."""
    inputs = Inputs(2, 192, seed=3)
    inputs.visible[:, :, 192:] = False
    expected = inputs.attend(blockwise_attention)
    hidden = ~inputs.visible.any(dim=1)[..., None]
    inputs.cached[..., :-1] = torch.where(hidden, 50.0 * inputs.cached[..., :-1], inputs.cached[..., :-1])
    assert torch.equal(inputs.attend(blockwise_attention), expected)
    fewer = Inputs(2, 192, seed=3)
    fewer.num_blocks = 1
    fewer.visible, fewer.cached = fewer.visible[:, :, :192], fewer.cached[:, :192]
    assert torch.equal(fewer.attend(blockwise_attention), expected)
