"""Which mode of speculation the command asks for."""

from __future__ import annotations

import pytest

from easyspec.cli.clients import GenerateFlags, request_of
from easyspec.speculation.parameters import TreeBudget
from easyspec.v1 import generation_pb2

Mode = generation_pb2.SpeculationParameters


@pytest.mark.parametrize(
    ("flags", "mode"),
    [
        (GenerateFlags("x"), Mode.MODE_AUTO),
        (GenerateFlags("x", is_drafting=False), Mode.MODE_OFF),
        (GenerateFlags("x", tree_width=8), Mode.MODE_ON),
        (GenerateFlags("x", num_nodes=31), Mode.MODE_ON),
        (GenerateFlags("x", num_draft_levels=2, is_drafting=False), Mode.MODE_OFF),
    ],
)
def test_who_names_a_tree_gets_that_tree(flags: GenerateFlags, mode: int) -> None:
    speculation = request_of(flags, TreeBudget(5, 4, 15)).speculation
    assert speculation.mode == mode
    assert speculation.budget.num_nodes == (flags.num_nodes or 15)
