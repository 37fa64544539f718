"""Both roles with captured passes say what they say without, and report ready once all is captured."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from drafter_service.config import DrafterSettings
from drafter_service.engine import DrafterEngine
from easyspec.errors import ConfigurationError
from easyspec.model import graph_warm_up
from easyspec.speculation.messages import OpenVerification
from easyspec.speculation.parameters import SamplingParameters, StopConditions
from tests.conftest import NUM_KV_SLOTS, started
from tests.engine_driver import Output, drafting, generate
from tests.fakes.captured_logs import captured_logs
from tests.fakes.replayed_traces import TraceRecorder
from verifier_service.config import VerifierSettings
from verifier_service.engine import VerifierEngine

PROMPTS = ((5, 8, 13, 21, 34, 55), (3,), tuple(range(1, 120)))
SAMPLINGS = (SamplingParameters(seed=0, temperature=0.0), SamplingParameters(seed=11, temperature=0.8))
MAX_TREE_NODES = 16


class Captured:
    """Engines of both roles whose passes are replayed, how often that was, and what they logged at start-up."""

    def __init__(self, verifier: VerifierEngine, drafter: DrafterEngine) -> None:
        self.verifier = verifier
        self.drafter = drafter
        self.recorders: list[TraceRecorder] = []
        self.events: list[dict[str, object]] = []


@pytest.fixture(scope="module")
def captured(base_folder: Path, draft_folder: Path) -> Iterator[Captured]:
    engines = Captured(
        VerifierEngine(
            VerifierSettings(
                model=str(base_folder),
                num_threads=1,
                num_kv_slots=NUM_KV_SLOTS,
                max_tree_nodes=MAX_TREE_NODES,
                cuda_graphs="on",
            )
        ),
        DrafterEngine(
            DrafterSettings(model=str(draft_folder), num_threads=1, num_kv_slots=NUM_KV_SLOTS, cuda_graphs="on")
        ),
    )

    def recorder(_: object) -> TraceRecorder:
        engines.recorders.append(TraceRecorder())
        return engines.recorders[-1]

    with pytest.MonkeyPatch.context() as patch, captured_logs() as logs:
        patch.setattr(graph_warm_up, "recorder_for", recorder)
        with started(engines.verifier), started(engines.drafter):
            events = [json.loads(line) for line in logs.getvalue().splitlines()]
            engines.events = [event for event in events if event["event"] == "graphs_captured"]
            yield engines


async def _both(verifier: VerifierEngine, drafter: DrafterEngine) -> list[Output]:
    """Everything at once, each drafted."""

    async def one(request: OpenVerification) -> Output:
        async with drafting(drafter, request) as drafts:
            return await generate(verifier, request, drafts)

    return await asyncio.gather(
        *(
            one(OpenVerification(prompt, sampling, StopConditions(24, ignore_eos=True)))
            for prompt in PROMPTS
            for sampling in SAMPLINGS
        )
    )


async def test_tokens_are_those_of_eager_engines(
    captured: Captured, verifier: VerifierEngine, drafter: DrafterEngine
) -> None:
    num_replays = [recorder.num_replays for recorder in captured.recorders]
    outputs = await _both(captured.verifier, captured.drafter)
    replays = [recorder.num_replays - num for recorder, num in zip(captured.recorders, num_replays, strict=True)]
    assert min(replays) > 20, "both roles replay"
    expected = await _both(verifier, drafter)
    assert [output.said for output in outputs] == [output.said for output in expected]
    assert sum(output.num_accepted for output in outputs) > 20


def test_passes_are_captured_before_the_role_is_ready(captured: Captured) -> None:
    assert captured.verifier.row_invariant, "the probe ran on captured passes too"
    for event, recorder in zip(captured.events, captured.recorders, strict=True):
        assert event["num_captured"] == recorder.num_recorded > 20
        assert event["num_left_out"] == 0
        assert isinstance(event["duration_s"], float)
        assert isinstance(event["held_mib"], float)


def test_a_cpu_captures_nothing_by_itself(verifier: VerifierEngine) -> None:
    assert verifier._loaded is not None
    assert verifier._loaded.decoder._graphs is None


def test_auto_is_for_one_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda", 0)
    choices: tuple[graph_warm_up.GraphChoice, ...] = ("auto", "on", "off")
    assert [graph_warm_up.is_wanted(choice, gpu) for choice in choices] == [True, True, False]
    assert [graph_warm_up.is_wanted(choice, cpu) for choice in choices] == [False, True, False]
    for choice in choices:
        graph_warm_up.check_graphs(choice)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert not any(graph_warm_up.is_wanted(choice, gpu) for choice in choices)
    with pytest.raises(ConfigurationError, match="several ranks"):
        graph_warm_up.check_graphs("on")
    graph_warm_up.check_graphs("auto")
