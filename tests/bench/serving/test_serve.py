"""The serving benchmark against a real gateway with the fakes behind it, and its figures checked by hand."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from rich.progress import Progress

from bench.harness.clients import GatewayClient
from bench.harness.streams import Outcome, Round, Speculation, Stream
from bench.harness.turns import rotated
from bench.serving.load import LoadGenerator, Window, WindowSettings
from bench.serving.overload import OverloadSettings, overload_report, run_overload
from bench.serving.plot import write_plot
from bench.serving.serve import ServeSettings, measure_windows, serve_section
from bench.serving.summary import percentiles, summarize
from bench.serving.workload import Workload
from easyspec.cli.processes import DEFAULT_BASE, DEFAULT_DRAFT, ServiceStack, StackSettings
from gateway.service.config import GatewaySettings
from gateway.service.server import GatewayServer
from gateway.text.tokenizer import Tokenizer
from tests.fakes.servers import eventually
from tests.fakes.services import TOY_TEXT, FakePair, ToyLanguage, running, running_pair
from tests.fakes.tiny_tokenizer import write_tokenizer

OFF, ON, AUTO = Speculation.OFF, Speculation.ON, Speculation.AUTO
SETTINGS = ServeSettings(
    concurrencies=(2,), num_turns=2, window_s=0.4, max_ramp_s=5.0, settle_s=0.1, mix="tiny", timeout_s=30.0
)


@asynccontextmanager
async def served(tmp_path: Path, **fields: Any) -> AsyncIterator[tuple[str, FakePair]]:
    folder = write_tokenizer(tmp_path)
    tokenizer = Tokenizer.load(folder)
    language = ToyLanguage(tokenizer.encode(TOY_TEXT), 352, tokenizer.fingerprint)
    async with running_pair(language) as pair:
        settings = GatewaySettings(
            address="127.0.0.1:0",
            tokenizer=folder,
            verifier_address=pair.verifier_service.address,
            drafter_address=pair.drafter_service.address,
            **fields,
        )
        async with running(GatewayServer(settings)) as service:
            yield service.address, pair


# --- what is asked for ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mix", ["mixed", "tiny"])
def test_a_task_is_the_same_in_every_setting_and_run(mix: str) -> None:
    workload, again = Workload(mix, 7), Workload(mix, 7)
    tasks = [workload.task(index, AUTO) for index in range(40)]
    assert [vars(again.task(index, OFF)) | {"speculation": AUTO} for index in range(40)] == [vars(t) for t in tasks]
    assert len({task.prompt for task in tasks}) > 20
    assert {task.temperature for task in tasks} == {0.0, 0.8}
    assert Workload(mix, 8).task(0, AUTO) != tasks[0]


def test_the_shared_prefix_mix_shares_a_long_prefix_and_nothing_else() -> None:
    workload = Workload("shared-prefix", 7)
    prompts = [workload.task(index, AUTO).prompt for index in range(20)]
    common = min(prompts, key=len)
    while not all(prompt.startswith(common) for prompt in prompts):
        common = common[:-1]
    assert len(common) > 500
    assert len(common) > 2 * max(len(prompt) - len(common) for prompt in prompts)


def test_each_setting_is_first_second_and_last_equally_often() -> None:
    orders = [rotated([OFF, ON, AUTO], turn) for turn in range(3)]
    assert all({order[place] for order in orders} == {OFF, ON, AUTO} for place in range(3))


# --- figures ----------------------------------------------------------------------------------------------------


def window(speculation: Speculation, num_tokens: int, gap_s: float) -> Window:
    """10 s to 11 s, one stream that began at 9 s and had its first chunk at 9.95 s."""
    stream = Stream(Workload("tiny", 7).task(0, speculation), 0, started_s=9.0, outcome=Outcome.CUT)
    is_drafted = speculation is not OFF
    at_s = 9.95
    while at_s < 11.5:
        stream.rounds.append(Round(at_s, num_tokens, num_tokens - 1, 5 if is_drafted else 0, 12, 2))
        at_s += gap_s
    return Window(speculation, 10.0, 11.0, [stream], [0.25, 0.75])


def test_figures_of_hand_made_windows() -> None:
    off, on, auto = summarize(4, [[window(OFF, 1, 0.1), window(ON, 3, 0.2), window(AUTO, 3, 0.25)]])
    assert (off["tokens_per_s"], on["tokens_per_s"]) == (10, 15)
    assert auto["vs_best"] == pytest.approx(auto["tokens_per_s"] / 15)
    assert auto["vs_best_error"] is None, "one turn"
    assert off["vs_best"] is None
    assert on["inter_token_ms"] is not None
    assert on["inter_token_ms"]["p50"] == pytest.approx(200 / 3)
    assert on["ttft_ms"] is not None
    assert on["ttft_ms"]["p99"] == pytest.approx(950)
    assert (off["mean_acceptance_length"], on["mean_acceptance_length"]) == (None, 3)
    assert (off["draft_share"], on["draft_share"]) == (0.0, 1.0)
    assert (on["batch_sessions"], on["batch_occupancy"], on["batch_rows"]) == (2, 0.5, 12)
    assert on["kv_use"] == 0.5
    assert (on["num_requests"], on["num_complete"], on["num_failed"]) == (1, 0, 0)


def test_auto_is_compared_with_the_setting_that_is_better_over_all_turns() -> None:
    """Not with the luckier one of each turn, which two settings that are alike would both lose to."""
    turns = [
        [window(OFF, num_tokens, gap_s), window(ON, 3, 0.2), window(AUTO, 3, 0.2)]
        for num_tokens, gap_s in ((2, 0.1), (2, 0.1), (1, 0.5))
    ]
    off, on, auto = summarize(4, turns)
    assert sum(off["tokens_per_s_by_window"]) < sum(on["tokens_per_s_by_window"])
    assert off["tokens_per_s"] > on["tokens_per_s"]
    assert auto["vs_best"] == pytest.approx(1.0)
    assert auto["vs_best_error"] == pytest.approx(0.0)
    assert summarize(4, [[window(AUTO, 3, 0.2)]])[0]["vs_best"] is None


def test_percentiles_of_nothing_are_unknown() -> None:
    assert percentiles([]) is None


# --- against a gateway ------------------------------------------------------------------------------------------


async def test_settings_are_measured_side_by_side_and_the_report_has_the_agreed_shape(tmp_path: Path) -> None:
    async with served(tmp_path) as (address, pair):
        pair.verifier.delay_s = 0.002
        async with GatewayClient(address, 30.0) as client:
            with Progress(disable=True) as progress:
                results = await measure_windows(client, pair.verifier_service.address, SETTINGS, progress)
        await eventually(lambda: not pair.verifier.sessions)
    assert [(result["concurrency"], result["speculation"]) for result in results] == [
        (2, "off"),
        (2, "on"),
        (2, "auto"),
    ]
    off, on, auto = results
    assert all(result["num_failed"] == result["num_refused"] == 0 for result in results)
    assert all(result["tokens_per_s"] > 0 and len(result["tokens_per_s_by_window"]) == 2 for result in results)
    assert (off["draft_share"], off["mean_acceptance_length"]) == (0.0, None)
    assert on["draft_share"] > 0.5
    assert on["mean_acceptance_length"] is not None
    assert on["mean_acceptance_length"] > 2
    assert on["tokens_per_s"] > off["tokens_per_s"]
    assert auto["vs_best"] is not None
    assert 0 < (on["kv_use"] or 0) < 1
    assert on["inter_token_ms"] is not None
    assert on["inter_token_ms"]["p50"] <= on["inter_token_ms"]["p95"] <= on["inter_token_ms"]["p99"]


async def test_poisson_arrivals_come_at_their_rate_and_never_exceed_the_limit(tmp_path: Path) -> None:
    async with served(tmp_path) as (address, pair):
        async with GatewayClient(address, 30.0) as client:
            generator = LoadGenerator(client, None, Workload("tiny", 7))
            window = await generator.run(WindowSettings(64, 1.5, 5.0, rate=20.0), AUTO, 0)
        assert 10 <= len(window.streams) <= 80
        assert window.num_skipped == 0
        pair.verifier.delay_s = 0.5
        async with GatewayClient(address, 30.0) as client:
            generator = LoadGenerator(client, None, Workload("tiny", 7))
            window = await generator.run(WindowSettings(2, 1.0, 5.0, rate=50.0), AUTO, 0)
        assert len(window.streams) == 2
        assert window.num_skipped > 5


@pytest.mark.parametrize(("gap_s", "is_passed"), [(0.1, True), (0.19, True), (0.25, False)])
def test_overload_may_double_the_time_between_tokens(gap_s: float, is_passed: bool) -> None:
    at_capacity, streams = window(OFF, 1, 0.1).streams, window(OFF, 1, gap_s).streams
    for stream in streams:
        stream.outcome = Outcome.COMPLETE
    report = overload_report(OverloadSettings(1.0, 1), 1.0, at_capacity, streams, [[]], 1.0, 0.0)
    assert report["slowdown"] == pytest.approx(gap_s / 0.1)
    assert report["is_passed"] is is_passed


async def check_overload(address: str, settings: OverloadSettings, mix: str) -> None:
    async with GatewayClient(address, 30.0) as client:
        with Progress(disable=True) as progress:
            report = await run_overload(client, Workload(mix, 7), settings, progress)
    assert report["num_complete"] > 0
    assert report["num_refused"] > 0
    assert (report["num_wrong"], report["num_refused_without_hint"], report["num_failed"]) == (0, 0, 0), report[
        "verdict"
    ]
    assert report["refused_ms"] is not None
    assert report["refused_ms"]["p99"] < 30_000
    assert report["is_passed"], report["verdict"]


async def test_overload_serves_the_accepted_refuses_the_rest_and_recovers(tmp_path: Path) -> None:
    limits = {"max_concurrent_requests": 4, "max_waiting_requests": 4, "admission_timeout_s": 2.0}
    # A verdict of the fakes costs nothing: what a busy machine does in between is most of a gap.
    settings = OverloadSettings(4.0, concurrency=4, calibration_s=2.0, max_slowdown=100.0)
    async with served(tmp_path, **limits) as (address, pair):
        pair.verifier.delay_s = 0.01
        await check_overload(address, settings, "tiny")
        assert pair.verifier.num_opened > 0


@pytest.mark.slow
@pytest.mark.timeout(400)
async def test_two_minutes_of_overload_on_the_bundled_pair() -> None:
    flags = ("--max-concurrent-requests", "8", "--max-waiting-requests", "16", "--admission-timeout-s", "5")
    stack = StackSettings(DEFAULT_BASE, DEFAULT_DRAFT, flags={"gateway": flags})
    async with ServiceStack(stack, lambda role, line: None) as services:
        await check_overload(services.gateway_address, OverloadSettings(120.0, concurrency=8), "short")


# --- what is made of it -----------------------------------------------------------------------------------------


def report_of(results: list[Any]) -> dict[str, Any]:
    return {
        "command": "easyspec bench serve --quick",
        "machine": {"cpu": "Z80", "cores": 2, "memory_gib": 1, "torch": "2.13", "python": "3.11"},
        "commit": "abc",
        "date": "2026-01-01",
        "pair": {"name": "bundled", "base": "base", "draft": "draft"},
        "settings": {**vars(SETTINGS), "speculations": ["off", "on", "auto"]},
        "results": json.loads(json.dumps(results)),
        "overload": None,
    }


def test_table_and_plot(tmp_path: Path) -> None:
    results = summarize(4, [[window(OFF, 1, 0.1), window(ON, 3, 0.2), window(AUTO, 3, 0.25)]])
    report = report_of(results)
    document = serve_section("serve-bundled.json", report)
    assert "## Many streams: the bundled pair (serve-bundled.json)" in document
    assert "| 4 | on | 15.0 |" in document
    write_plot(report["results"], tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
