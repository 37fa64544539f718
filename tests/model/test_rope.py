from __future__ import annotations

from pathlib import Path

import torch

from easyspec.model.config import load_config
from easyspec.model.rope import interleave_heads, rotate, rotation_table
from tests.fakes.checkpoints import write_checkpoint


def test_pairs_of_a_head_stand_side_by_side() -> None:
    rows = torch.arange(16.0)  # two heads of eight dimensions
    expected = [0.0, 4.0, 1.0, 5.0, 2.0, 6.0, 3.0, 7.0, 8.0, 12.0, 9.0, 13.0, 10.0, 14.0, 11.0, 15.0]
    assert interleave_heads(rows, 8).tolist() == expected
    matrix = torch.randn(16, 3)
    assert torch.equal(interleave_heads(matrix, 8), matrix[[int(row) for row in expected]])


def test_a_rotation_is_the_halves_formula_on_interleaved_dimensions(tmp_path: Path) -> None:
    config = load_config(write_checkpoint(tmp_path, head_dim=8), max_model_len=20)
    table = rotation_table(config, torch.device("cpu"))
    assert table.shape == (20, 4)
    assert table.dtype == torch.complex64
    heads = torch.randn(20, 3, 8, generator=torch.Generator().manual_seed(0))
    angles = torch.arange(20.0)[:, None] / 10000.0 ** (torch.arange(0, 8, 2) / 8)
    cos, sin = (function(angles).repeat(1, 2)[:, None] for function in (torch.cos, torch.sin))
    swapped = torch.cat([-heads[..., 4:], heads[..., :4]], dim=-1)
    expected = heads * cos + swapped * sin
    order = [0, 4, 1, 5, 2, 6, 3, 7]
    turned = rotate(heads[..., order].contiguous(), table[:, None])
    torch.testing.assert_close(turned, expected[..., order], atol=1e-5, rtol=0.0)
