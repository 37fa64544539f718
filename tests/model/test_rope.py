from __future__ import annotations

from pathlib import Path

import torch

from easyspec.model.config import load_config
from tests.fakes.checkpoints import write_checkpoint
from tests.model.passes import rotary_table


def test_tables_hold_every_position_of_the_context(tmp_path: Path) -> None:
    config = load_config(write_checkpoint(tmp_path, head_dim=8), max_model_len=20)
    rotary = rotary_table(config)
    assert rotary.rotary_dim == 8
    angles = torch.arange(20.0)[:, None] / 10000.0 ** (torch.arange(0, 8, 2) / 8)
    for table, function in ((rotary.cosines, torch.cos), (rotary.sines, torch.sin)):
        assert table.dtype == torch.float32
        torch.testing.assert_close(table, function(angles), atol=1e-6, rtol=0.0)
