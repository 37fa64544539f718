"""Captured passes of a decoder: one per shape and plan, over shared buffers.

Dimensions: `T` rows of a shape, `E` hidden size.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from easyspec.model.captures import Body, Recorder
from easyspec.model.pass_shapes import DEFAULT_SHAPE_LIMITS, PassShape, ShapeLimits, fitting_shape, shape_ladder
from easyspec.model.row_layout import RowLayout, Segment
from easyspec.model.static_inputs import StaticInputs
from easyspec.parallel.layer_groups import LayerPlan

Compute = Callable[[RowLayout, LayerPlan], torch.Tensor]


@dataclass(frozen=True)
class CaptureRequest:
    """Passes by `plan` whose segments have up to `most_rows_per_segment` rows."""

    plan: LayerPlan
    most_rows_per_segment: int


@dataclass(frozen=True)
class CaptureLimits:
    """Bounds of all captures together: the largest shapes, their number, and the memory (bytes) that they may hold.

    200 is more than any ladder of two plans has; a capture of 32 layers takes a few megabytes of the driver's memory.
    """

    shapes: ShapeLimits = DEFAULT_SHAPE_LIMITS
    max_captures: int = 200
    max_bytes: int = 4 * 2**30


@dataclass(frozen=True)
class CaptureReport:
    """What warming up came to; passes of the shapes left out run eagerly. `failure` is what ended it early, if any."""

    num_captured: int
    num_left_out: int
    duration_ns: int
    held_bytes: int
    failure: str | None = None


@dataclass(frozen=True)
class PassDimensions:
    """What the shapes of a decoder's passes depend on."""

    max_model_len: int
    num_queries_per_kv: int
    hidden_size: int
    dtype: torch.dtype
    is_flat: bool


@dataclass(frozen=True)
class CapturedLayout:
    """A pass that is to be replayed: the segments, the shape that holds them, and the replay."""

    segments: tuple[Segment, ...]
    plan: LayerPlan
    shape: PassShape
    replay: Body

    @property
    def num_rows(self) -> tuple[int, ...]:
        """Rows of every segment, without padding."""
        return tuple(len(segment) for segment in self.segments)

    def flat_row(self, segment: int, row: int) -> int:
        """Index of a segment's row among all rows."""
        return segment * self.shape.rows_per_segment + row


class PassGraphs:
    """The captures. `compute` is the eager pass: [T] tokens of a layout -> hidden states [T, E]."""

    def __init__(self, dimensions: PassDimensions, device: torch.device, compute: Compute, recorder: Recorder) -> None:
        self._dimensions = dimensions
        self._device = device
        self._compute = compute
        self._recorder = recorder
        self._replays: dict[LayerPlan, dict[PassShape, Body]] = {}
        self._bodies: list[Body] = []  # they hold memory that replays read
        self._inputs: StaticInputs | None = None
        self._output = torch.empty(0)

    def capture(self, requests: Sequence[CaptureRequest], limits: CaptureLimits) -> CaptureReport:
        """Capture what is asked for, the smallest shapes of all plans first, until a limit is reached; once.

        The KV pool's trash slot is written to, and no other.
        """
        assert self._inputs is None, "captured once"
        started_ns = time.monotonic_ns()
        wanted = [(shape, request.plan) for request in requests for shape in self._ladder(request, limits.shapes)]
        wanted.sort(key=lambda each: each[0].cost)
        shapes = {shape for shape, _ in wanted}
        d = self._dimensions
        self._inputs = StaticInputs(shapes, d.num_queries_per_kv, self._device, is_flat=d.is_flat)
        most_rows = max(shape.num_rows for shape in shapes)
        self._output = torch.empty(most_rows, d.hidden_size, dtype=d.dtype, device=self._device)
        self._replays = {request.plan: {} for request in requests}
        num_captured, failure = 0, None
        for shape, plan in wanted:
            if num_captured == limits.max_captures or self._held_bytes >= limits.max_bytes:
                break
            self._inputs.fill((), shape)
            body = self._body(shape, plan)
            self._bodies.append(body)
            try:
                self._replays[plan][shape] = self._recorder.record(body)
            except RuntimeError as error:  # out of memory, or an operation that this device cannot capture
                failure = str(error)
                break
            num_captured += 1
        duration_ns = time.monotonic_ns() - started_ns
        return CaptureReport(num_captured, len(wanted) - num_captured, duration_ns, self._held_bytes, failure)

    def fitting(self, segments: Sequence[Segment], plan: LayerPlan) -> CapturedLayout | None:
        """A captured pass that holds these segments; None if there is none, and the pass is for eager execution."""
        replays = self._replays.get(plan)
        if not replays or (shape := fitting_shape(replays, segments)) is None:
            return None
        return CapturedLayout(tuple(segments), plan, shape, replays[shape])

    def run(self, layout: CapturedLayout, plan: LayerPlan) -> torch.Tensor:
        """Hidden states [T, E]; they are overwritten by the next replay. `plan` is what the layout is for."""
        assert self._inputs is not None, "captured"
        assert layout.plan == plan, "arranged for another plan"
        self._inputs.fill(layout.segments, layout.shape)
        layout.replay()
        return self._output[: layout.shape.num_rows]

    def has(self, plan: LayerPlan) -> bool:
        """Whether passes by `plan` are captured, and hold its weights."""
        return plan in self._replays

    @property
    def _held_bytes(self) -> int:
        num_own = self._inputs.num_bytes if self._inputs is not None else 0
        return num_own + self._output.nbytes + self._recorder.held_bytes

    def _ladder(self, request: CaptureRequest, limits: ShapeLimits) -> tuple[PassShape, ...]:
        return shape_ladder(
            limits,
            most_rows_per_segment=request.most_rows_per_segment,
            max_model_len=self._dimensions.max_model_len,
            num_queries_per_kv=self._dimensions.num_queries_per_kv,
        )

    def _body(self, shape: PassShape, plan: LayerPlan) -> Body:
        assert self._inputs is not None, "captured"
        buffers, output = self._inputs.buffers(shape), self._output[: shape.num_rows]

        def body() -> None:
            output.copy_(self._compute(buffers.layout(), plan))

        return body
