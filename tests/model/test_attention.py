"""Both forms of attention against torch's own; tolerance 1e-5 absolute, where outputs are about 1."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from easyspec.model.attention import AttentionFunction, blockwise_attention, flat_attention
from easyspec.model.row_layout import Blocks

FORMS: tuple[AttentionFunction, ...] = (blockwise_attention, flat_attention)
_MINUS_INFINITY = float("-inf")
_NUM_HEADS, _NUM_QUERIES, _HEAD_DIM = 2, 5, 16


class Inputs:
    """Random queries [A, B, Q, D], columns [A, B, K, W, 2 * D + 1] and visibility [A, B, Q, K, W].

    Segment b sees its first `lengths[b]` blocks; `lengths` falls.
    """

    def __init__(self, lengths: tuple[int, ...], width: int, seed: int, scale: float = 1.0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.lengths = lengths
        heads = (_NUM_HEADS, len(lengths))
        self.queries = scale * torch.randn(*heads, _NUM_QUERIES, _HEAD_DIM, generator=generator)
        pairs = torch.randn(*heads, lengths[0], width, 2 * _HEAD_DIM, generator=generator)
        self.cached = torch.cat([pairs, torch.ones(*pairs.shape[:-1], 1)], dim=-1)
        visible = torch.rand(*heads, _NUM_QUERIES, lengths[0], width, generator=generator) < 0.4
        visible[..., 0, 0] = True  # a row that sees nothing has no answer
        for segment, length in enumerate(lengths):
            visible[:, segment, :, length:] = False
        self.visible = visible

    @property
    def mask(self) -> torch.Tensor:
        return torch.zeros(self.visible.shape).masked_fill(~self.visible, _MINUS_INFINITY)

    def attend(self, attention: AttentionFunction) -> torch.Tensor:
        queries, cached, mask = self.arranged(attention)
        return attention(queries, cached, mask, self.blocks)

    @property
    def blocks(self) -> Blocks:
        counts = tuple(sum(length > block for length in self.lengths) for block in range(self.lengths[0]))
        return Blocks(counts, torch.tensor([segment for count in counts for segment in range(count)]))

    def arranged(self, attention: AttentionFunction) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        if attention is flat_attention:
            cached = self.cached.flatten(0, 2)
            return self.queries.clone(), cached, self.mask.flatten(3).flatten(0, 1)
        places = [(segment, block) for block, count in enumerate(self.blocks.counts) for segment in range(count)]
        cached = torch.stack([self.cached[:, segment, block] for segment, block in places], dim=1)
        mask = torch.stack([self.mask[:, segment, :, block] for segment, block in places], dim=1)
        return self.queries.clone(), cached.flatten(0, 1), mask.flatten(0, 1)

    def expected(self) -> torch.Tensor:
        columns = self.cached.flatten(2, 3)
        keys, values = columns[..., :_HEAD_DIM], columns[..., _HEAD_DIM:-1]
        visible = self.visible.flatten(3)
        return functional.scaled_dot_product_attention(self.queries, keys, values, attn_mask=visible, scale=1.0)


@pytest.mark.parametrize(
    ("lengths", "width"), [((1,), 1), ((1, 1, 1), 128), ((2, 2), 128), ((3, 1, 1), 144), ((5, 3, 2), 8), ((7,), 8)]
)
@pytest.mark.parametrize("seed", range(2))
def test_both_forms_are_softmax_attention(lengths: tuple[int, ...], width: int, seed: int) -> None:
    inputs = Inputs(lengths, width, seed)
    results = [inputs.attend(attention) for attention in FORMS]
    for result in results:
        torch.testing.assert_close(result, inputs.expected(), atol=1e-5, rtol=0.0)
    torch.testing.assert_close(results[0], results[1], atol=1e-5, rtol=0.0)


@pytest.mark.parametrize("attention", FORMS)
def test_neither_form_overflows(attention: AttentionFunction) -> None:
    """Scores of several hundred: e^x of them is infinite in float32 unless the largest is taken off first."""
    inputs = Inputs((3, 2), 16, seed=0, scale=100.0)
    scores = inputs.queries @ inputs.cached[..., :_HEAD_DIM].flatten(2, 3).transpose(2, 3)
    assert scores.max() > 500.0
    torch.testing.assert_close(inputs.attend(attention), inputs.expected(), atol=1e-3, rtol=0.0)


def test_the_inputs_are_left_alone() -> None:
    for attention in FORMS:
        inputs = Inputs((2, 1), 16, seed=0)
        arranged = inputs.arranged(attention)
        kept = [tensor.clone() for tensor in arranged]
        attention(*arranged, inputs.blocks)
        for tensor, before in zip(arranged, kept, strict=True):  # one mask serves all layers of a pass
            assert torch.equal(tensor, before)


def test_columns_and_blocks_out_of_sight_change_no_bit() -> None:
    """Other branches of a tree and blocks behind a row's own: their contents and their number."""
    inputs = Inputs((2, 2, 1), 192, seed=3)
    inputs.visible[..., 1:, :] = False
    expected = inputs.attend(blockwise_attention)
    hidden = ~inputs.visible.any(dim=2)[..., None]
    inputs.cached[..., :-1] = torch.where(hidden, 50.0 * inputs.cached[..., :-1], inputs.cached[..., :-1])
    assert torch.equal(inputs.attend(blockwise_attention), expected)
    inputs.lengths = (1, 1, 1)
    inputs.visible, inputs.cached = inputs.visible[..., :1, :], inputs.cached[:, :, :1]
    assert torch.equal(inputs.attend(blockwise_attention), expected)


def test_empty_blocks_behind_a_text_change_no_bit() -> None:
    """What a pass that is padded to a shape reads."""
    inputs = Inputs((5, 5), 128, seed=5)
    inputs.visible[:, :, :, 3:] = False
    padded = inputs.attend(blockwise_attention)
    inputs.lengths = (3, 3)
    inputs.visible, inputs.cached = inputs.visible[..., :3, :], inputs.cached[:, :, :3]
    assert torch.equal(inputs.attend(blockwise_attention), padded)


def test_a_segments_result_does_not_depend_on_its_company() -> None:
    inputs = Inputs((7, 5, 4, 3, 1), 128, seed=4)
    together = inputs.attend(blockwise_attention)
    for segment, length in enumerate(inputs.lengths):
        alone = Inputs((length,), 128, seed=0)
        alone.queries = inputs.queries[:, segment : segment + 1]
        alone.cached = inputs.cached[:, segment : segment + 1, :length]
        alone.visible = inputs.visible[:, segment : segment + 1, :, :length]
        assert torch.equal(alone.attend(blockwise_attention)[:, 0], together[:, segment])
