from __future__ import annotations

import json
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.progress import Progress

from bench.decode import decode
from bench.decode.decode import DecodeSettings, decode_section, interleaved
from bench.decode.samples import Sample, complete_each, select_modes
from bench.harness.clients import GatewayClient
from bench.harness.pairs import ModelPair
from easyspec.errors import ConfigurationError, UnavailableError
from easyspec.v1 import generation_pb2 as pb
from easyspec.v1 import types_pb2
from tests.fakes.scripted_gateway import serve_scripted_gateway

MODES = select_modes(["sequential", "n4-staged-uncalibrated"])
SETTINGS = DecodeSettings(num_prompts=2, max_tokens=16, budget=(3, 4, 12))
ROUNDS = [[1], [2, 3, 4], [5, 6]]


def test_every_mode_sees_a_prompt_before_the_next_and_orders_rotate() -> None:
    planned = list(interleaved(["a", "b"], MODES, SETTINGS))
    assert [each.prompt_index for each in planned] == [0] * 6 + [1] * 6
    assert [each.mode for each in planned[:3]] == list(MODES)
    assert [each.mode for each in planned[6:9]] == [*MODES[1:], MODES[0]]
    assert {(each.prompt_index, each.task.seed) for each in planned} == {(0, 7), (1, 8)}


async def test_requests_carry_mode_plan_budget_and_seed() -> None:
    async with serve_scripted_gateway(ROUNDS) as (gateway, address), GatewayClient(address, 10.0) as client:
        with Progress(disable=True) as progress:
            samples = await complete_each(client, list(interleaved(["a", "b"], MODES, SETTINGS)), 3, str, progress)
    assert len(samples) == 2 * 2 * 3
    warm_up, measured = gateway.requests[:3], gateway.requests[3:]
    assert [request.stop.max_tokens for request in warm_up] == [24] * 3
    plain, sequential, staged = measured[:3]
    assert plain.text == "a"
    assert plain.speculation.mode == pb.SpeculationParameters.MODE_OFF
    assert (plain.sampling.seed, plain.sampling.temperature, plain.stop.max_tokens) == (7, 0.0, 16)
    assert sequential.speculation.layer_plan.layer_parallel_size == 1
    assert staged.speculation.mode == pb.SpeculationParameters.MODE_ON
    assert staged.speculation.budget == types_pb2.TreeBudget(num_levels=3, width=4, num_nodes=12)
    plan = staged.speculation.layer_plan
    assert (plan.layer_parallel_size, plan.mlp, plan.calibration) == (
        4,
        types_pb2.LayerPlan.MLP_PLACEMENT_STAGED,
        False,
    )
    assert plan.HasField("calibration")


async def test_a_sample_is_what_the_stream_said() -> None:
    async with serve_scripted_gateway(ROUNDS) as (_, address), GatewayClient(address, 10.0) as client:
        planned = list(interleaved(["a"], MODES, SETTINGS))[1]
        stream = await client.complete(planned.task)
    sample = Sample.of_stream(planned, stream)
    assert sample.token_ids == (1, 2, 3, 4, 5, 6)
    assert [item.num_tokens for item in sample.rounds] == [1, 3, 2]
    assert sample.rounds[1].draft_ns == 3_000_000
    assert (sample.counts.num_drafted_by_level, sample.counts.num_accepted_by_level) == ((2, 2, 1), (2, 1))
    assert sample.time_to_first_token_s == sample.rounds[0].at_s - stream.started_s > 0


async def test_without_a_drafter_the_benchmark_refuses() -> None:
    state = pb.GetServerInfoResponse.PEER_STATE_UNREACHABLE
    async with serve_scripted_gateway(ROUNDS, state) as (_, address), GatewayClient(address, 10.0) as client:
        with pytest.raises(UnavailableError, match="PEER_STATE_UNREACHABLE"):
            await client.info(needs_drafter=True)


def _run_main(monkeypatch: pytest.MonkeyPatch, path: Path, rounds: Sequence[Sequence[int]]) -> int:
    @asynccontextmanager
    async def start_services(pair: ModelPair) -> AsyncIterator[SimpleNamespace]:
        async with serve_scripted_gateway(rounds) as (_, address):
            yield SimpleNamespace(gateway_address=address)

    monkeypatch.setattr(decode, "start_services", start_services)
    return decode.BENCHMARK.main(["--quick", "--num-prompts", "2", "--temperature", "0", "--json", str(path)])


def test_main_writes_a_file_that_the_report_renders(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "new" / "decode-test.json"
    assert _run_main(monkeypatch, path, ROUNDS) == 0
    content = json.loads(path.read_text(encoding="utf-8"))
    assert content["command"].startswith("easyspec bench decode --quick --num-prompts 2")
    assert content["settings"]["budget"] == {"num_levels": 5, "width": 4, "num_nodes": 16}
    assert {"cpu", "cores", "torch", "python"} <= content["machine"].keys()
    assert [row["mode"] for row in content["results"]][:2] == ["plain", "sequential"]
    sequential = content["results"][1]
    assert sequential["overhead_ms_per_round"] == pytest.approx(2.0)
    assert sequential["fuzzy_ms_per_step"] == pytest.approx(0.5)
    assert sequential["acceptance_rate"] == pytest.approx(3 / 5)
    assert sequential["num_differing_completions"] == 0
    text = decode_section(path.name, content)
    assert "tiny, 2.5 M parameters, 4 layers, float32" in text
    assert content["command"] in text


def test_main_fails_if_a_mode_changes_the_tokens(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class Drifting(Sequence[list[int]]):
        """Another token in every completion."""

        def __init__(self) -> None:
            self.num_completions = 0

        def __len__(self) -> int:
            return 2

        def __getitem__(self, index: int) -> list[int]:  # type: ignore[override]
            if index >= len(self):
                raise IndexError(index)
            self.num_completions += index == 0
            return [self.num_completions]

    assert _run_main(monkeypatch, tmp_path / "drift.json", Drifting()) == 1


def test_a_missing_checkpoint_is_named_with_its_remedy(tmp_path: Path) -> None:
    pair = ModelPair("bench", tmp_path / "base", tmp_path / "draft", "make bench-pair")
    with pytest.raises(ConfigurationError, match=f"{tmp_path / 'base'}.*make bench-pair"):
        pair.check()


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--num-prompts", "0"], "--num-prompts"),
        (["--budget", "5", "4"], "requires 3 arguments"),
        (["--pair", "other"], "'other' is none of bundled"),
    ],
)
def test_bad_arguments_are_named(arguments: list[str], complaint: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        decode.BENCHMARK.main(arguments)
    assert ended.value.code == 2
    assert complaint in capsys.readouterr().err


async def test_a_gateway_that_is_gone_is_an_error_of_ours() -> None:
    async with GatewayClient("127.0.0.1:1", 10.0) as client:
        with pytest.raises(UnavailableError):
            await client.complete(next(interleaved(["a"], MODES, SETTINGS)).task)
