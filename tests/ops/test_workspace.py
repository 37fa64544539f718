from __future__ import annotations

import torch

from easyspec.ops.program import ProgramWriter
from easyspec.ops.workspace import Workspace


def test_buffers_do_not_overlap_and_rows_are_padded() -> None:
    program = ProgramWriter()
    buffers = [program.buffer(33), program.buffer(5, is_selected=True), program.buffer(64)]
    workspace = Workspace(torch.device("cpu"))
    starts = workspace.place(buffers, num_rows=3, num_selected=2)
    views = [workspace.view(b, start, 2 if b.is_selected else 3) for b, start in zip(buffers, starts, strict=False)]
    assert [view.shape for view in views] == [(3, 33), (2, 5), (3, 64)]
    assert [view.stride(0) for view in views] == [64, 32, 64]
    for value, view in enumerate(views):
        view.fill_(float(value))
    assert [view.unique().tolist() for view in views] == [[0.0], [1.0], [2.0]]


def test_memory_is_kept_and_only_grows() -> None:
    program = ProgramWriter()
    buffers = [program.buffer(32)]
    workspace = Workspace(torch.device("cpu"))
    workspace.place(buffers, num_rows=100, num_selected=0)
    address = workspace.address
    for num_rows in (1, 100, 120):  # a quarter is put on top
        workspace.place(buffers, num_rows=num_rows, num_selected=0)
        assert workspace.address == address
    starts = workspace.place(buffers, num_rows=2000, num_selected=0)
    assert workspace.view(buffers[0], starts[0], 2000).shape == (2000, 32)
