"""Native and reference executors side by side: what tests of operations share."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from easyspec.model.row_layout import Segment, lay_out
from easyspec.ops.executor import Executor
from easyspec.ops.kv_pool import KVPool
from easyspec.ops.native import NativeExecutor
from easyspec.ops.native_library import CodePath
from easyspec.ops.program import (
    Buffer,
    ProgramWriter,
)
from easyspec.ops.reference import ReferenceExecutor
from easyspec.ops.rows import PassRows
from tests.ops.small_model import CPU, PATHS

Write = Callable[[ProgramWriter, Executor], tuple[dict[Buffer, torch.Tensor], list[Buffer]]]


@pytest.fixture(params=[f"{path.name.lower()} {num_threads}" for path in PATHS for num_threads in (1, 2)])
def native(request: pytest.FixtureRequest) -> NativeExecutor:
    path, num_threads = request.param.split()
    return NativeExecutor(int(num_threads), CodePath[path.upper()])


@pytest.fixture(params=[f"{path.name.lower()} {run}" for path in PATHS for run in ("1", "2", "2 8bit")])
def multiplying(request: pytest.FixtureRequest) -> NativeExecutor:
    """For products: inputs of integer weights with 16 bits, and with 8."""
    path, num_threads, *bits = request.param.split()
    return NativeExecutor(int(num_threads), CodePath[path.upper()], has_byte_inputs=bool(bits))


@pytest.fixture
def reference() -> ReferenceExecutor:
    return ReferenceExecutor(CPU)


def random_tensor(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def plain_rows(num_rows: int, vocab_size: int = 100) -> PassRows:
    """A text from its beginning."""
    slots = np.arange(1, num_rows + 1)
    token_ids = [7 * row % vocab_size for row in range(num_rows)]
    segment = Segment(token_ids, range(num_rows), slots.tolist(), range(1, num_rows + 1), slots)
    return lay_out([segment]).rows


def run(executor: Executor, write: Write, rows: PassRows, pool: KVPool | None = None) -> list[torch.Tensor]:
    """The outputs of a program that `write` writes."""
    program = ProgramWriter()
    inputs, outputs = write(program, executor)
    pool = pool or KVPool(1, 1, 16, 0, torch.float32, CPU)
    return [output.clone() for output in executor.compile(program).run(rows, pool, inputs, outputs)]


def assert_close(actual: torch.Tensor, expected: torch.Tensor, tolerance: torch.Tensor | float) -> None:
    assert actual.shape == expected.shape
    assert actual.isfinite().all()
    excess = (actual - expected).abs() - tolerance
    assert (excess <= 0).all(), f"{float(excess.max()):.3g} beyond the tolerance"
