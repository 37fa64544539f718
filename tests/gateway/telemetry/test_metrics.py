"""What a request leaves behind: metrics by vLLM's names and one event; with real requests at a live gateway."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest
from prometheus_client.parser import text_string_to_metric_families

from easyspec.errors import CapacityError
from easyspec.rpc.channels import open_channel, request_metadata
from easyspec.speculation.parameters import FinishReason, SamplingParameters, StopConditions
from easyspec.v1 import generation_pb2, generation_pb2_grpc, types_pb2
from gateway.messages.chunk import GenerationChunk
from gateway.messages.request import GenerationRequest
from gateway.service.config import GatewaySettings
from gateway.service.server import GatewayServer
from gateway.telemetry.observation import Ending
from gateway.text.tokenizer import Tokenizer
from tests.fakes.captured_logs import captured_logs
from tests.fakes.services import TOY_TEXT, FakePair, ToyLanguage, running, running_pair

PROMPT = "secretprompt of a client"


class Scraped(dict[tuple[str, ...], float]):
    """Samples by name and label values in order of the labels' names, without the model's."""

    def __missing__(self, key: tuple[str, ...]) -> float:
        return 0.0


def scrape(server: GatewayServer) -> Scraped:
    samples = Scraped()
    for family in text_string_to_metric_families(server.metrics.render().decode()):
        for sample in family.samples:
            labels = [value for name, value in sample.labels.items() if name != "model_name"]
            samples[(sample.name, *labels)] = sample.value
    return samples


class Live:
    """A gateway, a channel to it and the fakes behind it."""

    def __init__(self, server: GatewayServer, channel: grpc.aio.Channel, pair: FakePair) -> None:
        self.server, self.pair = server, pair
        self._stub = generation_pb2_grpc.GenerationServiceStub(channel)

    def call(self, max_tokens: int = 40, request_id: str = "r-1", **fields: Any) -> Any:
        request = generation_pb2.GenerateRequest(
            text=PROMPT, stop=types_pb2.StopConditions(max_tokens=max_tokens), **fields
        )
        return self._stub.Generate(request, timeout=20, metadata=request_metadata(request_id))

    async def generate(self, **fields: Any) -> list[generation_pb2.GenerateResponse]:
        return [chunk async for chunk in self.call(**fields)]

    async def info(self) -> generation_pb2.GetServerInfoResponse:
        return await self._stub.GetServerInfo(generation_pb2.GetServerInfoRequest())  # type: ignore[no-any-return]


@asynccontextmanager
async def live_gateway(pair: FakePair, folder: Path, **fields: Any) -> AsyncIterator[Live]:
    settings = GatewaySettings(
        address="127.0.0.1:0",
        tokenizer=folder,
        verifier_address=pair.verifier_service.address,
        drafter_address=pair.drafter_service.address,
        probe_interval_s=0.05,
        **fields,
    )
    server = GatewayServer(settings)
    async with running(server) as service, open_channel(service.address) as channel:
        yield Live(server, channel, pair)


@pytest.fixture
async def live(tokenizer: Tokenizer, tokenizer_folder: Path) -> AsyncIterator[Live]:
    language = ToyLanguage(tokenizer.encode(TOY_TEXT), 352, tokenizer.fingerprint)
    async with running_pair(language) as pair, live_gateway(pair, tokenizer_folder) as live:
        yield live


async def until(condition: Any, timeout_s: float = 5.0) -> None:
    async with asyncio.timeout(timeout_s):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


async def test_metrics_add_up_to_what_the_client_was_told(live: Live) -> None:
    chunks = await live.generate()
    await until(lambda: scrape(live.server)[("easyspec_rpcs_total", "OK", "Generate")] == 1)
    completion = chunks[-1].completion
    statistics = completion.speculation
    samples = scrape(live.server)
    assert samples[("vllm:prompt_tokens_total",)] == completion.usage.num_prompt_tokens
    assert samples[("vllm:generation_tokens_total",)] == completion.usage.num_output_tokens == 40
    assert samples[("vllm:request_success_total", "length")] == 1
    assert samples[("vllm:spec_decode_num_drafts_total",)] == statistics.num_draft_rounds > 0
    assert samples[("vllm:spec_decode_num_draft_tokens_total",)] == statistics.num_draft_tokens
    assert samples[("vllm:spec_decode_num_accepted_tokens_total",)] == statistics.num_accepted_tokens > 0
    for level, (drafted, accepted) in enumerate(
        zip(statistics.num_drafted_by_level, statistics.num_accepted_by_level, strict=True)
    ):
        assert samples[("easyspec_drafted_levels_total", str(level))] == drafted
        assert samples[("vllm:spec_decode_num_accepted_tokens_per_pos_total", str(level))] == accepted
    assert samples[("easyspec_rounds_total",)] == statistics.num_rounds
    assert samples[("easyspec_round_verify_seconds_count",)] == statistics.num_rounds
    assert samples[("easyspec_round_draft_seconds_count",)] == statistics.num_draft_rounds
    assert samples[("vllm:time_to_first_token_seconds_count",)] == 1
    assert samples[("vllm:inter_token_latency_seconds_count",)] == statistics.num_rounds - 1
    assert samples[("vllm:e2e_request_latency_seconds_count",)] == 1
    spent = sum(samples[(f"easyspec_round_{part}_seconds_sum",)] for part in ("draft", "verify", "overhead"))
    assert spent == pytest.approx(sum(chunk.timings.round_ns for chunk in chunks) / 1e9, rel=0.2)


async def test_gauges_tell_what_is_so_at_the_scrape(live: Live) -> None:
    assert scrape(live.server)[("vllm:num_requests_running",)] == 0
    live.pair.verifier.delay_s = 0.3
    waiting = [asyncio.create_task(live.generate(max_tokens=5)) for _ in range(3)]
    await until(lambda: scrape(live.server)[("vllm:num_requests_running",)] == 3)
    await until(lambda: scrape(live.server)[("vllm:kv_cache_usage_perc",)] > 0)
    live.pair.verifier.delay_s = 0.0
    await asyncio.gather(*waiting)
    assert scrape(live.server)[("vllm:num_requests_running",)] == 0
    drafter = live.pair.drafter_service.address
    samples = scrape(live.server)
    assert samples[("easyspec_peer_state", drafter, "drafter", "ready")] == 1
    await live.pair.drafter_service.kill()
    await until(lambda: scrape(live.server)[("easyspec_peer_state", drafter, "drafter", "unreachable")] == 1)
    assert scrape(live.server)[("easyspec_peer_state", drafter, "drafter", "ready")] == 0
    assert scrape(live.server)[("easyspec_peer_state", live.pair.verifier_service.address, "verifier", "ready")] == 1


async def test_clients_that_go_away_and_errors_are_told_apart(live: Live) -> None:
    live.pair.verifier.delay_s = 0.05
    call = live.call(max_tokens=400)
    await call.read()
    call.cancel()
    await until(lambda: scrape(live.server)[("vllm:request_success_total", "abort")] == 1)
    await until(lambda: not live.pair.verifier.sessions and not live.pair.drafter.sessions)
    live.pair.verifier.error = CapacityError("full")
    with pytest.raises(grpc.aio.AioRpcError):
        await live.generate()
    samples = scrape(live.server)
    assert samples[("vllm:request_success_total", "error")] == 1
    assert samples[("easyspec_refusals_total", "CAPACITY")] == 1
    assert samples[("vllm:request_success_total", "length")] == 0


async def test_a_lost_drafter_is_counted(live: Live) -> None:
    live.pair.drafter.error = CapacityError("full")
    chunks = await live.generate()
    # Once, or again where the completion outlasted the pause before the next try.
    num_failures = chunks[-1].completion.speculation.num_drafter_failures
    assert scrape(live.server)[("easyspec_drafter_failures_total",)] == num_failures >= 1


async def test_one_event_a_request_and_none_for_routine(live: Live) -> None:
    with captured_logs() as logs:
        await live.generate(request_id="r-7", stop_strings=["never said"])
        await asyncio.sleep(0.3)  # several probes
    events = [json.loads(line) for line in logs.getvalue().splitlines()]
    [finished] = [event for event in events if event["event"] == "request_finished"]
    assert finished["request_id"] == "r-7"
    assert finished["reason"] == "length"
    assert finished["client"] == "ipv4:127.0.0.1"
    assert finished["num_output_tokens"] == 40
    assert finished["num_rounds"] > 1
    assert 0 < finished["first_token_ms"] <= finished["duration_ms"]
    # The three services run in this process: one stream each.
    methods = [event["method"].rpartition("/")[2] for event in events if event["event"] == "rpc_finished"]
    assert sorted(methods) == ["Generate", "Speculate", "Verify"]
    for word in ("secretprompt", "client wants", "never said", "quick", "brown"):
        assert word not in logs.getvalue()


async def test_an_observer_that_breaks_costs_nobody_anything(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("a bug of an observer")

    for method in ("started", "round", "finished"):
        monkeypatch.setattr(f"gateway.telemetry.metrics._RequestMetrics.{method}", broken)
    with captured_logs() as logs:
        chunks = await live.generate()
    assert chunks[-1].completion.usage.num_output_tokens == 40
    assert "observer_bug" in logs.getvalue()
    assert '"request_finished"' in logs.getvalue()


async def test_every_reason_to_finish_is_counted(live: Live) -> None:
    observer = live.server.metrics(GenerationRequest("p", SamplingParameters(0)), "toy-base")
    [chunk] = [chunk async for chunk in _one_round(live)]
    for reason in FinishReason:
        completion = replace(chunk.completion, finish_reason=reason)
        observer.round(chunk)
        observer.finished(Ending(reason.value, {0: completion}, is_complete=True))
        assert scrape(live.server)[("vllm:request_success_total", reason.value)] >= 1


async def _one_round(live: Live) -> AsyncIterator[GenerationChunk]:
    request = GenerationRequest("p", SamplingParameters(0), StopConditions(max_tokens=1))
    async for chunk in live.server.generator.generate(request, 10):
        yield chunk


async def test_routine_rpcs_that_fail_are_still_told(live: Live) -> None:
    with captured_logs() as logs:
        await live.pair.verifier_service.kill()
        await until(lambda: "unreachable" in logs.getvalue())


async def test_what_speculation_is_found_to_bring_is_told_by_metrics_and_by_the_server(
    pair: FakePair, tokenizer_folder: Path
) -> None:
    async with live_gateway(pair, tokenizer_folder) as live:
        pair.verifier.delay_s = 0.001
        await live.generate(max_tokens=400)
        (model,) = (await live.info()).served_models
        state, samples = model.speculation, scrape(live.server)
        assert samples[("easyspec_speculation_arm", state.arm)] == 1
        arms = {key: value for key, value in samples.items() if key[0] == "easyspec_speculation_arm"}
        assert (len(arms), sum(arms.values())) == (4, 1)
        assert state.tokens_per_s["small"] > 0
        throughputs = [key for key in samples if key[0] == "easyspec_speculation_arm_tokens_per_second"]
        assert {arm for _, arm in throughputs} == set(state.tokens_per_s)
        assert samples[("easyspec_speculation_trials_total",)] == state.num_trials <= state.num_switches
        assert samples[("easyspec_speculation_switches_total",)] == state.num_switches
        assert 0.0 < state.acceptance_by_level[0] <= 1.0
