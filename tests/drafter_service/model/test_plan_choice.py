"""On how many threads a draft model runs, from the time that a step takes on one and on all."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from drafter_service.model.plan_choice import settle_threads
from easyspec.ops.native import NativeExecutor
from easyspec.ops.native_library import library_problem
from tests.model.passes import Passes

pytestmark = pytest.mark.skipif(library_problem() is not None, reason="the library was not built")


def clock(executor: NativeExecutor, step_s: dict[int, float]) -> Callable[[], float]:
    """Every look at it is a step later on so many threads."""
    now = itertools.accumulate(step_s[executor.num_threads] for _ in itertools.count())
    return lambda: next(now)


@pytest.mark.parametrize(
    ("alone_s", "together_s", "num_threads"), [(1.0, 1.0, 1), (1.0, 0.95, 1), (1.0, 0.8, 2), (1.0, 1.4, 1)]
)
def test_threads_must_be_clearly_faster(
    draft_folder: Path, alone_s: float, together_s: float, num_threads: int
) -> None:
    executor = NativeExecutor(2)
    model = Passes(draft_folder, executor=executor, num_slots=128)
    with torch.inference_mode():
        settle_threads(model.decoder, model.memory, clock(executor, {1: alone_s, 2: together_s}))
    assert executor.num_threads == num_threads
    assert model.memory.num_available == 128
