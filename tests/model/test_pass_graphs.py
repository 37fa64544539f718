"""Captured passes: the same bits as eager ones, whatever the buffers held before.

Replays repeat recorded operations on the same memory, as CUDA graphs do; only the capture call is another.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from easyspec.errors import ConfigurationError
from easyspec.model import graph_warm_up
from easyspec.model.captures import TwinRecorder, recorder_for
from easyspec.model.decoder import MAX_PLANS
from easyspec.model.pass_graphs import CapturedLayout, CaptureLimits, CaptureReport, CaptureRequest
from easyspec.model.pass_shapes import NUM_COLUMNS, ShapeLimits
from easyspec.model.row_layout import RowLayout
from easyspec.model.row_probe import make_row_invariant
from easyspec.parallel.layer_groups import LayerPlan, paper_plan
from easyspec.speculation.parameters import MlpPlacement
from easyspec.speculation.token_tree import EMPTY_TREE, TokenTree
from tests.fakes.checkpoints import write_checkpoint
from tests.fakes.replayed_traces import TraceRecorder
from tests.model.passes import CPU, Passes, random_token_ids, random_tree
from verifier_service.config import VerifierSettings

_NUM_TOKENS = 270
_LIMITS = CaptureLimits(ShapeLimits(max_rows=128, max_blocks=12))
CHECKPOINTS: dict[str, dict[str, Any]] = {
    "llama": {},
    "one KV head": {"model_type": "qwen2", "num_key_value_heads": 1},
    "head norms": {"model_type": "qwen3", "head_dim": 32},
}


def _capture(passes: Passes, most_rows: int, *plans: LayerPlan, limits: CaptureLimits = _LIMITS) -> TraceRecorder:
    recorder = TraceRecorder()
    requests = [CaptureRequest(plan, most_rows) for plan in plans or (passes.decoder.sequential_plan,)]
    with torch.inference_mode():
        passes.decoder.capture(passes.pool, requests, recorder, limits)
    return recorder


@pytest.fixture(scope="module", params=CHECKPOINTS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint"), **CHECKPOINTS[request.param])


@pytest.fixture(scope="module")
def eager(folder: Path) -> Passes:
    return Passes(folder, is_exact=True)


@pytest.fixture(scope="module")
def captured(folder: Path) -> tuple[Passes, TraceRecorder]:
    passes = Passes(folder, is_exact=True)
    return passes, _capture(passes, 65)


@pytest.fixture(scope="module")
def token_ids(eager: Passes) -> list[int]:
    return random_token_ids(_NUM_TOKENS, eager.config.vocab_size)


@pytest.fixture(scope="module")
def expected(eager: Passes, token_ids: list[int]) -> torch.Tensor:
    """Logits of the whole text as one eager prompt."""
    return eager.prefill(token_ids)


@pytest.mark.parametrize("seed", range(4))
def test_replays_have_the_bits_of_eager_passes(
    captured: tuple[Passes, TraceRecorder], token_ids: list[int], expected: torch.Tensor, seed: int
) -> None:
    """Shapes come in random order, so each finds the rows and columns of others in its buffers."""
    passes, recorder = captured
    num_replays, num_passes = recorder.num_replays, 0
    rng = np.random.default_rng(seed)
    session = passes.open()
    while (start := session.slots.num_cached) < _NUM_TOKENS:
        chunk = token_ids[start : start + int(rng.choice([1, 1, 2, 3, 5, 8, 17, 60]))]
        others = [passes.open() for _ in range(rng.integers(0, 4))]
        segments = [
            other.chain(random_token_ids(int(rng.integers(1, 9)), passes.config.vocab_size, seed)) for other in others
        ]
        place = int(rng.integers(0, len(others) + 1))
        segments.insert(place, session.chain(chunk))
        logits = passes.run(*segments)[place]
        num_passes += 1
        for other in others:
            other.close()
        assert torch.equal(logits, expected[start : start + len(chunk)]), f"rows {start} to {start + len(chunk)}"
    session.close()
    assert recorder.num_replays - num_replays > num_passes // 2


@pytest.mark.parametrize("length", [1, 40, 120, 127, 128, 250, 255])
def test_trees_have_the_bits_of_eager_prompts(
    captured: tuple[Passes, TraceRecorder], token_ids: list[int], expected: torch.Tensor, length: int
) -> None:
    passes, recorder = captured
    path = token_ids[length + 1 : length + 6]
    tree, rows = random_tree(20, passes.config.vocab_size, length, path)
    session, other = passes.open(), passes.open()
    passes.run(session.chain(token_ids[:length]))
    num_replays = recorder.num_replays
    (alone,) = passes.run(session.tree(token_ids[length], tree))
    session.drop_tree()
    _, beside = passes.run(other.tree(token_ids[0], EMPTY_TREE), session.tree(token_ids[length], tree))
    session.close()
    other.close()
    assert recorder.num_replays == num_replays + 2
    for logits in (alone, beside):
        assert torch.equal(logits[rows], expected[length : length + len(rows)])


@torch.inference_mode()
def test_what_the_buffers_held_changes_nothing(
    captured: tuple[Passes, TraceRecorder], token_ids: list[int], expected: torch.Tensor
) -> None:
    passes, _ = captured
    graphs = passes.decoder._graphs
    assert graphs is not None
    assert graphs._inputs is not None
    session, other = passes.open(), passes.open()
    passes.run(session.chain(token_ids[:130]))
    for garbage in (0xFF, 0x01):
        graphs._inputs._on_host.fill_(garbage)
        graphs._inputs._on_device.fill_(garbage)
        graphs._output.fill_(torch.nan)
        # Five rows in two of the four segments of a shape.
        logits, _ = passes.run(session.chain(token_ids[130:133]), other.chain(token_ids[:2]))
        assert torch.equal(logits, expected[130:133])
        session.slots.truncate(130)
        other.slots.truncate(0)
    session.close()
    other.close()


def test_padding_writes_to_the_trash_slot_only(captured: tuple[Passes, TraceRecorder], token_ids: list[int]) -> None:
    passes, recorder = captured
    table = passes.pool.table.view(-1, passes.pool.num_slots + 1, passes.pool.table.shape[1])
    session = passes.open()
    before, num_replays = table.clone(), recorder.num_replays
    segment = session.chain(token_ids[-3:])  # nobody had these at the text's beginning
    passes.run(segment)
    assert recorder.num_replays == num_replays + 1
    changed = (table != before).any(dim=2).any(dim=0).nonzero().flatten().tolist()
    session.close()
    assert set(changed) - {0} == set(segment.slots)


@torch.inference_mode()
def test_the_probe_covers_replays(folder: Path) -> None:
    passes = Passes(folder, is_exact=True)
    recorders: list[TraceRecorder] = []
    assert make_row_invariant(passes.decoder, passes.pool, lambda: recorders.append(_capture(passes, 16)))
    assert recorders[0].num_replays > 0
    assert passes.memory.num_used_slots == 0


def test_the_twin_replays_by_computing_again(folder: Path, token_ids: list[int], expected: torch.Tensor) -> None:
    passes = Passes(folder, is_exact=True)
    recorder = recorder_for(CPU)
    assert isinstance(recorder, TwinRecorder)
    with torch.inference_mode():
        request = CaptureRequest(passes.decoder.sequential_plan, 8)
        passes.decoder.capture(passes.pool, [request], recorder, CaptureLimits(ShapeLimits(16, 4)))
    session = passes.open()
    layout = passes.decoder.arrange([session.chain(token_ids[:5])])
    assert isinstance(layout, CapturedLayout)
    with torch.inference_mode():
        assert torch.equal(passes.decoder.row_logits(layout, range(5), passes.pool), expected[:5])
    session.close()


@pytest.mark.parametrize("mlp", MlpPlacement)
def test_fuzzy_passes_of_drafts(folder: Path, token_ids: list[int], mlp: MlpPlacement) -> None:
    """Guesses need not be the same bits: their sums are formed over whole rows of columns."""
    plan = paper_plan(3, 2, mlp) if mlp is MlpPlacement.SEQUENTIAL else LayerPlan((range(1), range(1, 3)), mlp)
    eager, captured = Passes(folder, is_exact=False), Passes(folder, is_exact=False)
    recorder = _capture(captured, 8, plan, captured.decoder.sequential_plan)
    tree = TokenTree((3, 4, 5, 6), (0, 0, 1, 1))
    logits: list[Sequence[torch.Tensor]] = []
    for passes in (eager, captured):
        long, short = passes.open(), passes.open()
        passes.run(long.chain(token_ids[:200]))
        logits.append(passes.run(short.tree(7, EMPTY_TREE), long.tree(9, tree), plan=plan))
    assert recorder.num_replays == 1
    for one, other in zip(*logits, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def _layout_of(passes: Passes, *num_rows: int, plan: LayerPlan | None = None, context: int = 0) -> object:
    sessions = [passes.open() for _ in num_rows]
    for session in sessions:
        session.slots.extend(context)
    layout = passes.decoder.arrange([s.chain([1] * n) for s, n in zip(sessions, num_rows, strict=True)], plan)
    for session in sessions:
        session.close()
    return layout


def test_what_no_shape_holds_runs_eagerly(captured: tuple[Passes, TraceRecorder]) -> None:
    passes, _ = captured
    assert isinstance(_layout_of(passes, 64), CapturedLayout)
    assert isinstance(_layout_of(passes, 129), RowLayout), "too many rows"
    assert isinstance(_layout_of(passes, 40, *[1] * 3), RowLayout), "too many rows when padded"
    assert isinstance(_layout_of(passes, *[1] * 13), RowLayout), "too many blocks"
    assert isinstance(_layout_of(passes, 4, 4, 4, context=400), RowLayout), "too many blocks when padded"
    assert isinstance(_layout_of(passes, 4, plan=paper_plan(3, 2, MlpPlacement.STAGED)), RowLayout), "another plan"
    session = passes.open()
    tree = TokenTree(tuple(range(65)), (0,) * 65)
    assert isinstance(passes.decoder.arrange([session.tree(1, tree)]), RowLayout), "too large a tree"
    session.close()


class _HungryRecorder(TwinRecorder):
    """Each recording holds 1 MB."""

    def record(self, body: Any) -> Any:
        self.held_bytes += 10**6
        return super().record(body)


@pytest.mark.parametrize(
    ("limits", "most"),
    [
        (CaptureLimits(ShapeLimits(64, 8), max_captures=5), 5),
        (CaptureLimits(ShapeLimits(64, 8), max_bytes=4 * 10**6), 4),
    ],
)
def test_number_and_memory_of_captures_are_bounded(tmp_path: Path, limits: CaptureLimits, most: int) -> None:
    passes = Passes(write_checkpoint(tmp_path), is_exact=True)
    with torch.inference_mode():
        request = CaptureRequest(passes.decoder.sequential_plan, 32)
        report = passes.decoder.capture(passes.pool, [request], _HungryRecorder(), limits)
    assert isinstance(report, CaptureReport)
    assert 0 < report.num_captured <= most
    assert report.num_left_out > 5
    assert report.held_bytes > report.num_captured * 10**6
    assert report.duration_ns > 0
    # The cheapest come first, and what was left out runs eagerly.
    assert isinstance(_layout_of(passes, 2), CapturedLayout)
    assert isinstance(_layout_of(passes, 30), RowLayout)


class _ForgetfulRecorder(TwinRecorder):
    """Holds nothing of what it recorded, as a graph does."""

    def __init__(self) -> None:
        self.bodies: list[weakref.ref[Any]] = []

    def record(self, body: Any) -> Any:
        self.bodies.append(weakref.ref(body))
        return lambda: None


def test_what_replays_read_is_kept(tmp_path: Path) -> None:
    passes = Passes(write_checkpoint(tmp_path), is_exact=True)
    recorder = _ForgetfulRecorder()
    request = CaptureRequest(passes.decoder.sequential_plan, 4)
    passes.decoder.capture(passes.pool, [request], recorder, CaptureLimits(ShapeLimits(8, 4)))
    gc.collect()
    assert all(body() is not None for body in recorder.bodies)


class _FailingRecorder(TwinRecorder):
    """The device has memory for three recordings."""

    def __init__(self) -> None:
        self.num_recorded = 0

    def record(self, body: Any) -> Any:
        if self.num_recorded == 3:
            raise torch.OutOfMemoryError("no memory for a fourth")
        self.num_recorded += 1
        return super().record(body)


@pytest.mark.parametrize("choice", ["auto", "on"])
def test_a_capture_that_fails_leaves_the_rest_eager(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, choice: graph_warm_up.GraphChoice
) -> None:
    passes = Passes(write_checkpoint(tmp_path), is_exact=True)
    monkeypatch.setattr(graph_warm_up, "recorder_for", lambda device: _FailingRecorder())
    monkeypatch.setattr(graph_warm_up, "is_wanted", lambda *_: True)
    settings = VerifierSettings(model="x", cuda_graphs=choice)
    requests = [CaptureRequest(passes.decoder.sequential_plan, 32)]
    if choice == "on":
        with pytest.raises(ConfigurationError, match="no memory for a fourth"):
            graph_warm_up.capture_passes(passes.decoder, passes.pool, settings, requests)
        return
    report = graph_warm_up.capture_passes(passes.decoder, passes.pool, settings, requests)
    assert report is not None
    assert report.num_captured == 3
    assert isinstance(_layout_of(passes, 2), CapturedLayout)
    assert isinstance(_layout_of(passes, 30), RowLayout)


def test_weights_of_captured_plans_stay(tmp_path: Path) -> None:
    passes = Passes(write_checkpoint(tmp_path, num_hidden_layers=9), is_exact=False)
    decoder = passes.decoder
    plan = paper_plan(9, 4, MlpPlacement.STAGED)
    _capture(passes, 4, plan, limits=CaptureLimits(ShapeLimits(4, 1)))
    groups = decoder._groups_of_plan[plan]
    for size in range(2, 3 + MAX_PLANS):
        passes.prefill([1, 2, 3], paper_plan(9, size, MlpPlacement.SEQUENTIAL))
    assert decoder._groups_of_plan[plan] is groups
    assert len(decoder._groups_of_plan) == MAX_PLANS


def test_blocks_have_the_columns_that_exact_sums_allow() -> None:
    assert NUM_COLUMNS == 192
